// The list of conversations: pick, search, rename, delete (and undo), export and import.

import { readExport, writeExport } from "./conversation.js";
import { byId, download, iconButton, make, toast } from "./dom.js";
import { say } from "./words.js";

/** `owner`: conversations, conversation, pick(c), remove(c), restore(c), save(c), take(list). */
export class Sidebar {
  constructor(owner) {
    this.owner = owner;
    this.panel = byId("sidebar");
    this.list = byId("conversations");
    byId("search").addEventListener("input", () => this.draw());
    byId("new-chat").addEventListener("click", () => owner.begin());
    byId("export").addEventListener("click", () => this.export(owner.conversations, "conversations"));
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", (event) => this.import(event.target));
    byId("open-sidebar").addEventListener("click", () => this.toggle(true));
    byId("close-sidebar").addEventListener("click", () => this.toggle(false));
    byId("scrim").addEventListener("click", () => this.toggle(false));
    this.panel.addEventListener("keydown", (event) => this.onKey(event));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.panel.classList.contains("open")) this.toggle(false);
    });
  }

  get isDrawer() {
    return matchMedia("(max-width: 800px)").matches;
  }

  /** On a narrow screen the list is a drawer. */
  toggle(isOpen) {
    const was = this.panel.classList.contains("open");
    this.panel.classList.toggle("open", isOpen);
    byId("scrim").hidden = !isOpen;
    byId("open-sidebar").setAttribute("aria-expanded", String(isOpen));
    if (isOpen) byId("close-sidebar").focus();
    else if (was && this.isDrawer) byId("open-sidebar").focus();
  }

  /** Go to the list by keyboard. */
  focus() {
    if (this.isDrawer) this.toggle(true);
    (this.list.querySelector("[aria-current]") ?? this.list.querySelector(".pick") ?? byId("new-chat")).focus();
  }

  onKey(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || !event.target.matches(".pick")) return;
    const picks = Array.from(this.list.querySelectorAll(".pick"));
    picks[picks.indexOf(event.target) + step]?.focus();
    event.preventDefault();
  }

  draw() {
    const { conversations, conversation } = this.owner;
    const words = byId("search").value.trim().toLowerCase();
    const found = conversations.filter((one) => !words || textOf(one).includes(words));
    this.list.replaceChildren(...found.map((one) => this.item(one, one === conversation)));
    if (words && found.length === 0) this.list.append(make("li", { class: "hint" }, say("noneFound")));
    byId("export").disabled = conversations.length === 0;
  }

  item(conversation, isCurrent) {
    const title = conversation.title || say("newChat");
    const pick = make("button", { type: "button", class: "pick", title }, title);
    if (isCurrent) pick.setAttribute("aria-current", "true");
    if (this.owner.isStreaming(conversation)) pick.append(make("span", { class: "dot", "aria-label": say("writing"), role: "img" }));
    pick.addEventListener("click", () => {
      this.owner.pick(conversation);
      if (this.isDrawer) this.toggle(false);
    });
    const item = make("li", { class: "item", data: { id: conversation.id } }, pick);
    item.append(
      make(
        "span",
        { class: "item-tools" },
        iconButton("edit", say("rename", { title }), () => this.rename(conversation, item)),
        iconButton("more", say("exportOne", { title }), () => this.export([conversation], title)),
        iconButton("delete", say("remove", { title }), () => this.remove(conversation, item)),
      ),
    );
    return item;
  }

  rename(conversation, item) {
    const box = make("input", { type: "text", class: "rename", "aria-label": say("newTitle"), maxlength: "200" });
    box.value = conversation.title;
    let isOver = false;
    const finish = (isKept) => {
      if (isOver) return;
      isOver = true;
      if (isKept && box.value.trim()) {
        conversation.title = box.value.trim();
        this.owner.save(conversation);
      }
      this.owner.titled();
      this.list.querySelector(`[data-id="${conversation.id}"] .pick`)?.focus();
    };
    box.addEventListener("keydown", (event) => {
      if (event.isComposing || (event.key !== "Enter" && event.key !== "Escape")) return;
      event.preventDefault();
      event.stopPropagation();
      finish(event.key === "Enter");
    });
    box.addEventListener("blur", () => finish(true));
    item.replaceChildren(box);
    box.select();
  }

  remove(conversation, item) {
    const next = item.nextElementSibling ?? item.previousElementSibling;
    const nextId = next?.dataset.id;
    this.owner.remove(conversation);
    (this.list.querySelector(`[data-id="${nextId}"] .pick`) ?? byId("new-chat")).focus();
    const act = () => this.owner.restore(conversation);
    toast(say("removed", { title: conversation.title || say("newChat") }), { label: say("undo"), act });
  }

  export(conversations, name) {
    const day = new Date().toISOString().slice(0, 10);
    download(`mtnlg-${name.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40)}-${day}.json`, writeExport(conversations));
  }

  async import(input) {
    const text = await input.files[0]?.text();
    input.value = "";
    if (text === undefined) return;
    let found = [];
    try {
      found = readExport(text);
    } catch {
      found = []; // not JSON
    }
    if (found.length === 0) {
      toast(say("badFile"));
      return;
    }
    await this.owner.take(found);
    toast(say("imported", { count: found.length }));
  }
}

function textOf(conversation) {
  return [conversation.title, ...Object.values(conversation.messages).map(({ text }) => text)].join("\n").toLowerCase();
}
