// The page: what is open, what is on its way, and which key does what.

import { listModels } from "./api.js";
import { Alternatives } from "./alternatives.js";
import { Announcer } from "./announcer.js";
import { addMessage, dropLeaf, newConversation, pathOf, showVersion } from "./conversation.js";
import { byId, icon, make, toast } from "./dom.js";
import { listen } from "./keys.js";
import { Notice } from "./notice.js";
import { SettingsSheet } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { ConversationStore, loadSettings, saveSettings } from "./store.js";
import { AnswerStream } from "./stream.js";
import { fillWords, getLanguage, isChinese, say, setLanguage } from "./words.js";
import { View } from "./view.js";

const SAVE_EVERY_MS = 2000;
const LOOK_AGAIN_SECONDS = 5; // for a server that is not there
const REST = 3; // after a drawing, so many times what it took
const THEMES = ["auto", "light", "dark"];
const THEME_ICONS = { auto: "auto", light: "sun", dark: "moon" };

class App {
  constructor() {
    this.settings = loadSettings();
    this.store = new ConversationStore();
    this.conversations = [];
    this.models = [];
    this.streams = new Map(); // id of a conversation -> its AnswerStream
    this.announcer = new Announcer(byId("announce"));
    this.view = new View({
      again: (message) => this.answer(this.conversation, message.parent),
      edit: (message, text) => this.editMessage(message, text),
      show: (message) => this.showBranch(message),
      goOn: (message) => this.goOn(message),
    });
    this.sidebar = new Sidebar(this);
    this.sheet = new SettingsSheet(this);
    this.notice = new Notice({
      openSettings: (id) => this.sheet.open(id),
      begin: () => this.begin(),
      canDrop: () => this.conversation.mode === "chat" && this.settings.overflow === "refuse",
      dropOldest: () => this.setOverflow("drop"),
    });
    this.conversation = newConversation(this.mode, this.settings.system);
    const piecesOf = (node) => this.conversation.messages[node.closest(".message")?.dataset.id]?.pieces;
    this.alternatives = new Alternatives(byId("messages"), piecesOf, (text) => this.announcer.say(text));
  }

  async start() {
    this.applyLooks();
    listen(this);
    this.draw();
    const isKept = await this.store.open();
    this.conversations = await this.store.all();
    const wanted = location.hash.slice(1);
    const found = this.conversations.find((one) => one.id === wanted);
    if (found) this.conversation = found;
    this.draw();
    if (!isKept) toast(say("notKept"));
    if (!matchMedia("(pointer: coarse)").matches) byId("prompt").focus();
    await this.loadModels();
    document.documentElement.dataset.ready = "true";
  }

  // -- models

  async loadModels(waits = 0) {
    try {
      this.models = await listModels(this.settings.key);
      this.notice.clear();
    } catch (error) {
      if (error.name === "AbortError") return;
      this.notice.show(error, (count) => this.loadModels(count), waits, LOOK_AGAIN_SECONDS);
    }
    this.drawModels();
    if (!this.conversation.leaf) this.conversation.mode = this.mode;
    this.draw();
  }

  get model() {
    const ids = this.models.map(({ id }) => id);
    return ids.includes(this.settings.model) ? this.settings.model : (ids[0] ?? "");
  }

  /** Whether the model was never trained to chat, as far as the server says. */
  get isBase() {
    return this.models.find(({ id }) => id === this.model)?.has_chat_template === false;
  }

  get mode() {
    return this.settings.mode === "auto" ? (this.isBase ? "text" : "chat") : this.settings.mode;
  }

  drawModels() {
    const select = byId("model");
    const names = this.models.length ? this.models.map(({ id }) => id) : [""];
    select.replaceChildren(...names.map((id) => make("option", { value: id }, id || say("noModel"))));
    select.value = this.model;
    select.disabled = this.models.length === 0;
    select.title = this.model;
  }

  // -- what is shown

  draw() {
    const { conversation, settings } = this;
    const isEmpty = pathOf(conversation).length === 0;
    const isStreaming = (message) => this.streams.get(conversation.id)?.message === message;
    this.view.show(conversation, { settings, isStreaming, model: this.model });
    byId("empty").hidden = !isEmpty;
    if (isEmpty) this.drawEmpty();
    this.sidebar.draw();
    this.drawTop();
  }

  drawTop() {
    const { conversation } = this;
    const title = conversation.title || say("newChat");
    byId("title").textContent = title;
    document.title = conversation.title ? `${conversation.title} · mtnlg` : "mtnlg";
    for (const button of document.querySelectorAll(".modes [data-mode]")) {
      const isChosen = button.dataset.mode === conversation.mode;
      button.setAttribute("aria-checked", String(isChosen));
      button.tabIndex = isChosen ? 0 : -1;
    }
    const isText = conversation.mode === "text";
    byId("prompt").placeholder = say(isText ? (conversation.leaf ? "promptMore" : "promptText") : "promptChat");
    const isBusy = this.streams.has(conversation.id);
    const label = say(isBusy ? "stop" : "send");
    const send = byId("send");
    send.replaceChildren(icon(isBusy ? "stop" : "send"));
    send.setAttribute("aria-label", label);
    send.title = label;
    send.classList.toggle("busy", isBusy);
    byId("status").textContent = isBusy ? say("writing") : "";
  }

  drawEmpty() {
    const isText = this.conversation.mode === "text";
    const starters = say(isText ? "beginnings" : "starters").split("\n");
    const use = (text) => () => {
      byId("prompt").value = text;
      this.send();
    };
    byId("empty").replaceChildren(
      make("h2", {}, say(isText ? "welcomeText" : "welcomeChat")),
      make("p", {}, say(this.isBase && !isText ? "aboutBase" : "aboutChat")),
      make(
        "div",
        { class: "starters" },
        ...starters.map((text) => make("button", { type: "button", class: "starter", on: { click: use(text) } }, text)),
      ),
    );
  }

  titled() {
    this.sidebar.draw();
    this.drawTop();
  }

  // -- conversations

  begin() {
    this.conversation = newConversation(this.mode, this.settings.system);
    history.replaceState(null, "", location.pathname + location.search);
    this.notice.clear();
    this.draw();
    this.sidebar.toggle(false);
    byId("prompt").focus();
  }

  pick(conversation) {
    this.conversation = conversation;
    history.replaceState(null, "", `#${conversation.id}`);
    this.notice.clear();
    this.view.isFollowing = true;
    this.draw();
  }

  isStreaming(conversation) {
    return this.streams.has(conversation.id);
  }

  async save(conversation) {
    await this.store.save(conversation);
  }

  async remove(conversation) {
    this.streams.get(conversation.id)?.stop();
    this.conversations = this.conversations.filter((one) => one !== conversation);
    if (conversation === this.conversation) this.conversation = newConversation(this.mode, this.settings.system);
    this.draw();
    await this.store.remove(conversation.id);
  }

  async restore(conversation) {
    await this.take([conversation]);
    this.pick(conversation);
  }

  async take(conversations) {
    this.conversations = [...conversations, ...this.conversations].sort((one, other) => other.changed - one.changed);
    this.draw();
    await Promise.all(conversations.map((one) => this.store.save(one)));
  }

  // -- talking

  send() {
    const { conversation } = this;
    const box = byId("prompt");
    if (this.streams.has(conversation.id)) return;
    const isText = conversation.mode === "text";
    if (!(isText ? box.value || conversation.leaf : box.value.trim())) return;
    if (box.value) addMessage(conversation, "user", isText ? box.value : box.value.trim());
    box.value = "";
    this.fitPrompt();
    this.answer(conversation, conversation.leaf);
  }

  editMessage(message, text) {
    addMessage(this.conversation, "user", this.conversation.mode === "text" ? text : text.trim(), message.parent);
    this.answer(this.conversation, this.conversation.leaf);
    byId("prompt").focus();
  }

  showBranch(message) {
    showVersion(this.conversation, message);
    this.save(this.conversation);
    this.draw();
  }

  stop() {
    this.streams.get(this.conversation.id)?.stop();
  }

  /** A text goes on with another piece, a chat with more of the answer that was cut off. */
  goOn(message) {
    const isRest = this.conversation.mode === "chat" && message.role === "assistant";
    this.answer(this.conversation, isRest ? message.parent : message.id, 0, isRest ? message : null);
  }

  /** Let the model answer to the message `parent`, or go on with the answer `open`. */
  async answer(conversation, parent, waits = 0, open = null) {
    if (this.streams.has(conversation.id)) return;
    this.notice.clear();
    const message = open ?? addMessage(conversation, "assistant", "", parent);
    if (!this.conversations.includes(conversation)) this.conversations.unshift(conversation);
    if (conversation === this.conversation) history.replaceState(null, "", `#${conversation.id}`);
    const grow = this.growing(conversation, message);
    const stream = new AnswerStream(conversation, message, { settings: this.settings, model: this.model, onGrow: grow });
    this.streams.set(conversation.id, stream);
    this.save(conversation); // the question outlasts a reload at once
    this.view.isFollowing = true;
    this.draw();
    this.announcer.say(say("writing"));
    let failure = null;
    try {
      await stream.run();
    } catch (error) {
      failure = error;
    }
    this.streams.delete(conversation.id);
    this.finish(conversation, message, failure, waits, open);
  }

  finish(conversation, message, failure, waits, open) {
    if (!message.text && message.end !== "stop" && message.end !== "length") dropLeaf(conversation, message);
    const isShown = conversation === this.conversation;
    if (this.conversations.includes(conversation)) this.save(conversation);
    if (isShown) {
      this.draw();
      this.announcer.end(failure ? "" : say(message.end === "stopped" ? "stopped" : "answered"));
      if (failure) this.notice.show(failure, (count) => this.answer(conversation, message.parent, count, open), waits);
    } else this.sidebar.draw();
    if (failure && !failure.kind) throw failure; // a fault of the page's own: let it be seen
  }

  /** What happens at each arrival: draw, but never most of the time; keep now and then. */
  growing(conversation, message) {
    let isDue = false;
    let nextDraw = 0;
    let kept = performance.now();
    const drawNow = () => {
      isDue = false;
      if (conversation !== this.conversation || !this.streams.has(conversation.id)) return;
      const began = performance.now();
      this.view.grow(message);
      this.view.drawFoot(message);
      const now = performance.now();
      nextDraw = now + REST * (now - began);
    };
    return (text) => {
      const now = performance.now();
      if (conversation === this.conversation) this.announcer.hear(text);
      if (!isDue) setTimeout(() => requestAnimationFrame(drawNow), Math.max(0, nextDraw - now));
      isDue = true;
      if (now - kept > SAVE_EVERY_MS) {
        kept = now;
        this.save(conversation);
      }
    };
  }

  // -- settings

  change({ isConversation = false, isLook = false, isKey = false } = {}) {
    saveSettings(this.settings);
    if (isConversation && this.conversations.includes(this.conversation)) this.save(this.conversation);
    if (isLook) this.draw();
    this.isKeyNew ||= isKey;
  }

  setOverflow(policy) {
    this.settings.overflow = policy;
    saveSettings(this.settings);
  }

  settingsClosed() {
    if (this.isKeyNew) this.loadModels();
    this.isKeyNew = false;
  }

  chooseMode(mode) {
    this.settings.mode = mode;
    saveSettings(this.settings);
    if (pathOf(this.conversation).length === 0) {
      this.conversation.mode = mode;
      this.draw();
    } else if (this.conversation.mode !== mode) this.begin();
  }

  applyLooks() {
    const { settings } = this;
    const root = document.documentElement;
    if (settings.theme === "auto") delete root.dataset.theme;
    else root.dataset.theme = settings.theme;
    const chosen = settings.language === "auto" ? (isChinese(navigator.language) ? "zh" : "en") : settings.language;
    setLanguage(chosen);
    root.lang = chosen === "zh" ? "zh-CN" : "en";
    fillWords(document);
    byId("language").textContent = chosen === "zh" ? "EN" : "中";
    byId("language").setAttribute("aria-label", say("switchLanguage"));
    byId("language").title = say("switchLanguage");
    const label = say(`theme${settings.theme[0].toUpperCase()}${settings.theme.slice(1)}`);
    byId("theme").replaceChildren(icon(THEME_ICONS[settings.theme]));
    byId("theme").setAttribute("aria-label", label);
    byId("theme").title = label;
    this.drawModels();
  }

  changeLooks() {
    saveSettings(this.settings);
    this.applyLooks();
    this.draw();
  }

  nextTheme() {
    this.settings.theme = THEMES[(THEMES.indexOf(this.settings.theme) + 1) % THEMES.length];
    this.changeLooks();
  }

  otherLanguage() {
    this.settings.language = getLanguage() === "zh" ? "en" : "zh";
    this.changeLooks();
  }

  chooseModel(name) {
    this.settings.model = name;
    saveSettings(this.settings);
    this.draw();
  }

  answerAgain() {
    const last = pathOf(this.conversation).pop();
    if (last) this.answer(this.conversation, last.role === "assistant" ? last.parent : last.id);
  }

  fitPrompt() {
    const box = byId("prompt");
    box.style.height = "auto";
    box.style.height = `${Math.min(box.scrollHeight, innerHeight * 0.4)}px`;
  }
}

new App().start();
