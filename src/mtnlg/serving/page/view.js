// Draws one conversation: its messages, with what can be done with each.

import { pathOf, versionsOf } from "./conversation.js";
import { byId, iconButton, make, toast } from "./dom.js";
import { blocksOf, renderBlock } from "./markdown.js";
import { putPieces } from "./tokens.js";
import { say } from "./words.js";

const UNFINISHED = new Set(["length", "stopped", "broken"]);

export class View {
  /** `actions`: again(message), edit(message, text), show(message), goOn(message). */
  constructor(actions) {
    this.actions = actions;
    this.scroller = byId("scroll");
    this.list = byId("messages");
    this.empty = byId("empty");
    this.drawn = new Map(); // id of a message -> what is drawn of it
    this.isFollowing = true;
    this.scroller.addEventListener("scroll", () => this.noteScroll(), { passive: true });
    byId("to-bottom").addEventListener("click", () => this.follow(true));
  }

  /** Draw the branch that the conversation shows. */
  show(conversation, { settings, isStreaming, model }) {
    this.context = { conversation, settings, isStreaming, model };
    const path = pathOf(conversation);
    this.drawn.clear();
    this.list.dataset.mode = conversation.mode;
    this.list.replaceChildren(...path.map((message) => this.article(message)));
    this.list.hidden = path.length === 0;
    this.follow();
  }

  article(message) {
    const isModel = message.role === "assistant";
    const name = isModel ? this.context.model || say("model") : say("you");
    const hasPieces = isModel && message.pieces?.some(([, tokens]) => tokens.length);
    const body = make("div", {
      class: "body",
      ...(hasPieces ? { tabindex: "0", role: "group", "aria-label": `${name}. ${say("walk")}` } : {}),
    });
    const foot = make("div", { class: "message-foot" });
    const article = make("article", { class: `message ${message.role}`, "aria-label": name, data: { id: message.id } }, make("h2", { class: "hidden" }, name), body, foot);
    this.drawn.set(message.id, { article, body, foot, blocks: [], name });
    this.drawBody(message);
    this.drawFoot(message);
    return article;
  }

  /** Draw what has arrived since the last time. */
  grow(message) {
    const drawn = this.drawn.get(message.id);
    if (!drawn) return;
    this.drawBody(message);
    if (message.pieces?.some(([, tokens]) => tokens.length) && !drawn.body.hasAttribute("tabindex")) {
      drawn.body.tabIndex = 0;
      drawn.body.setAttribute("role", "group");
      drawn.body.setAttribute("aria-label", `${drawn.name}. ${say("walk")}`);
    }
    this.follow();
  }

  drawBody(message) {
    const { body, blocks } = this.drawn.get(message.id);
    const { settings, conversation } = this.context;
    const isFormatted = message.role === "assistant" && settings.markdown && conversation.mode === "chat";
    const source = message.text;
    const put =
      message.role === "assistant" && settings.probabilities && message.pieces
        ? putPieces(source, message.pieces, settings.tint)
        : (parent, start, end) => end > start && parent.append(source.slice(start, end));
    const wanted = isFormatted
      ? blocksOf(source).filter((block) => block.kind !== "gap")
      : [{ kind: "plain", start: 0, end: source.length }];
    wanted.forEach((block, at) => {
      const mark = `${block.kind} ${block.start} ${block.end} ${block.items?.length ?? 0}`;
      if (blocks[at]?.mark === mark) return;
      if (block.kind === "plain" && blocks[at] && blocks[at].end <= block.end) {
        put(blocks[at].node, blocks[at].end, block.end); // it only ever grows
        Object.assign(blocks[at], { mark, end: block.end });
        return;
      }
      const node = block.kind === "plain" ? plainBlock(put, block) : withCopy(source, block, renderBlock(source, block, put, make));
      if (blocks[at]) blocks[at].node.replaceWith(node);
      else body.append(node);
      blocks[at] = { mark, node, end: block.end };
    });
    for (const extra of blocks.splice(wanted.length)) extra.node.remove();
    body.classList.toggle("waiting", message.role === "assistant" && !source && this.context.isStreaming(message));
    body.classList.toggle("growing", this.context.isStreaming(message));
  }

  drawFoot(message) {
    const { foot } = this.drawn.get(message.id);
    const isStreaming = this.context.isStreaming(message);
    const isModel = message.role === "assistant";
    const buttons = isStreaming
      ? []
      : [
          isModel && iconButton("again", say("again"), () => this.actions.again(message)),
          !isModel && iconButton("edit", say("edit"), () => this.beginEdit(message)),
          iconButton("copy", say("copy"), () => copy(message.text)),
        ];
    foot.replaceChildren(
      ...[
        this.versions(message),
        ...buttons,
        isModel && make("span", { class: "stats" }, statsOf(message)),
        this.isUnanswered(message) &&
          make("button", { type: "button", class: "link unanswered", on: { click: () => this.actions.goOn(message) } }, say("tryAgain")),
        isModel && !isStreaming && this.canGoOn(message) &&
          make("button", { type: "button", class: "link", on: { click: () => this.actions.goOn(message) } }, say("goOn")),
      ].filter(Boolean),
    );
  }

  /** A text always goes on; an answer where it was cut off. */
  canGoOn(message) {
    const { conversation } = this.context;
    const isCut = UNFINISHED.has(message.end) && message.text !== "";
    return conversation.leaf === message.id && (conversation.mode === "text" || isCut);
  }

  /** A page that was closed before the answer began leaves a question alone. */
  isUnanswered(message) {
    const { conversation } = this.context;
    return message.role === "user" && conversation.leaf === message.id;
  }

  versions(message) {
    const all = versionsOf(this.context.conversation, message);
    if (all.length < 2) return null;
    const at = all.findIndex((other) => other.id === message.id);
    const go = (name, label, step) =>
      iconButton(name, label, () => this.actions.show(all[at + step]), { disabled: !all[at + step] });
    return make(
      "span",
      { class: "versions", role: "group", "aria-label": say("branch", { at: at + 1, count: all.length }) },
      go("left", say("before"), -1),
      make("span", { "aria-hidden": "true" }, `${at + 1}/${all.length}`),
      go("right", say("after"), 1),
    );
  }

  /** Let the visitor change a message where it stands. */
  beginEdit(message) {
    const drawn = this.drawn.get(message.id);
    if (!drawn) return;
    const box = make("textarea", { class: "edit-box", "aria-label": say("editMessage"), rows: "2" });
    box.value = message.text;
    const cancel = () => {
      drawn.article.replaceWith(this.article(message));
      byId("prompt").focus();
    };
    const save = () => (box.value.trim() ? this.actions.edit(message, box.value) : cancel());
    box.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") cancel();
      else if (event.key === "Enter" && !event.shiftKey) save();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    drawn.article.classList.add("editing");
    drawn.body.replaceChildren(box);
    drawn.foot.replaceChildren(
      make("button", { type: "button", class: "small", on: { click: cancel } }, say("cancel")),
      make("button", { type: "button", class: "small primary", on: { click: save } }, say("save")),
    );
    box.focus();
  }

  noteScroll() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    this.isFollowing = scrollHeight - scrollTop - clientHeight < 60;
    byId("to-bottom").hidden = this.isFollowing;
  }

  /** Stay at the end, unless the visitor has scrolled up to read. */
  follow(force = false) {
    if (force) this.isFollowing = true;
    if (this.isFollowing) this.scroller.scrollTop = this.scroller.scrollHeight;
  }
}

function plainBlock(put, block) {
  const node = make("div", { class: "plain" });
  put(node, block.start, block.end);
  return node;
}

/** Give a code block its language and a button that copies it. */
function withCopy(source, block, node) {
  if (block.kind !== "code") return node;
  const text = block.lines.map((line) => source.slice(line.start, line.end)).join("\n");
  node.prepend(
    make(
      "figcaption",
      {},
      make("span", {}, block.language || say("code")),
      iconButton("copy", say("copyCode"), () => copy(text)),
    ),
  );
  return node;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copyOldWay(text); // plain http has no clipboard interface
  }
  toast(say("copied"));
}

function copyOldWay(text) {
  const box = make("textarea", { class: "hidden" });
  box.value = text;
  document.body.append(box);
  box.select();
  document.execCommand("copy");
  box.remove();
}

function statsOf(message) {
  const { stats = {}, end } = message;
  const words = [];
  if (stats.tokens) words.push(say("tokens", { count: stats.tokens }));
  if (stats.rate) words.push(say("rate", { rate: Number(stats.rate).toFixed(1) }));
  if (stats.first !== undefined && stats.first !== null) words.push(say("first", { seconds: Number(stats.first).toFixed(2) }));
  if (end === "stop" && !message.text) words.push(say("nothing"));
  if (end === "length") words.push(say("full"));
  if (stats.isShortened) words.push(say("shortened"));
  if (end === "content_filter") words.push(say("filtered"));
  if (end === "stopped") words.push(say("stopped"));
  if (end === "broken") words.push(say("broken"));
  return words.join(" · ");
}
