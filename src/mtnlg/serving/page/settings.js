// The settings sheet: access, instructions, sampling, display. Every change counts at once.

import { SAMPLING } from "./stream.js";
import { byId, iconButton, make } from "./dom.js";
import { say } from "./words.js";

// name: [least, most, step, whether a slider helps]
const RANGES = {
  temperature: [0, 2, 0.05, true],
  top_p: [0.01, 1, 0.01, true],
  top_k: [0, 1000, 1, false],
  min_p: [0, 1, 0.01, true],
  max_tokens: [1, 100000, 1, false],
  repetition_penalty: [0.5, 2, 0.01, true],
  presence_penalty: [-2, 2, 0.1, true],
  frequency_penalty: [-2, 2, 0.1, true],
  seed: [0, 2 ** 32, 1, false],
};
const NEUTRAL = { temperature: 1, top_p: 1, min_p: 0, repetition_penalty: 1, presence_penalty: 0, frequency_penalty: 0 };
const HINTED = new Set(["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"]);

/** `owner`: settings, conversation (the one shown), change(), chosen key: keyChanged(). */
export class SettingsSheet {
  constructor(owner) {
    this.owner = owner;
    this.dialog = byId("settings");
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
    this.dialog.addEventListener("close", () => owner.settingsClosed());
  }

  open(focus) {
    this.draw();
    this.dialog.showModal();
    const target = focus && byId(focus);
    if (target) target.focus();
  }

  draw() {
    this.dialog.replaceChildren(
      make(
        "header",
        { class: "sheet-head" },
        make("h2", { id: "settings-title" }, say("settings")),
        iconButton("close", say("close"), () => this.dialog.close()),
      ),
      make("div", { class: "sheet-body" }, this.voice(), this.sampling(), this.looks(), this.access()),
    );
  }

  voice() {
    const { settings, conversation } = this.owner;
    const system = make("textarea", { id: "set-system", rows: "4", "aria-describedby": "hint-system" });
    system.value = conversation.system;
    system.addEventListener("input", () => {
      conversation.system = settings.system = system.value;
      this.owner.change({ isConversation: true });
    });
    return group("voice", field("set-system", say("system"), system, "hint-system", say("systemHint")), this.overflow());
  }

  overflow() {
    const words = { refuse: "overflowRefuse", drop: "overflowDrop", summarise: "overflowSummarise" };
    const options = Object.entries(words).map(([value, name]) => make("option", { value }, say(name)));
    const select = make("select", { id: "set-overflow" }, ...options);
    select.value = this.owner.settings.overflow in words ? this.owner.settings.overflow : "refuse";
    select.addEventListener("change", () => this.owner.setOverflow(select.value));
    return field("set-overflow", say("overflow"), select);
  }

  sampling() {
    const reset = make("button", { type: "button", class: "small" }, say("reset"));
    reset.addEventListener("click", () => {
      this.owner.settings.sampling = {};
      this.owner.change();
      this.draw();
      byId("set-temperature").focus();
    });
    const stop = make("textarea", { id: "set-stop", rows: "2" });
    stop.value = this.owner.settings.sampling.stop ?? "";
    stop.addEventListener("input", () => this.set("stop", stop.value || undefined));
    return group(
      "sampling",
      make("p", { class: "hint" }, say("samplingHint")),
      ...SAMPLING.map((name) => this.number(name)),
      field("set-stop", say("stopStrings"), stop),
      reset,
    );
  }

  number(name) {
    const [min, max, step, hasSlider] = RANGES[name];
    const value = this.owner.settings.sampling[name];
    const id = `set-${name}`;
    const hint = HINTED.has(name) ? `hint-${name}` : null;
    const limits = { min: String(min), max: String(max), step: String(step) };
    const box = make("input", { type: "number", id, ...limits, placeholder: "–", inputmode: "decimal", "aria-describedby": hint });
    box.value = value ?? "";
    const slider = hasSlider && make("input", { type: "range", ...limits, "aria-label": say(name), tabindex: "-1", "aria-hidden": "true" });
    if (slider) {
      slider.value = value ?? NEUTRAL[name];
      slider.classList.toggle("unset", value === undefined);
      slider.addEventListener("input", () => {
        box.value = slider.value;
        slider.classList.remove("unset");
        this.set(name, Number(slider.value));
      });
    }
    box.addEventListener("input", () => {
      const isGood = box.value !== "" && box.validity.valid;
      this.set(name, isGood ? Number(box.value) : undefined);
      if (slider) {
        slider.value = isGood ? box.value : NEUTRAL[name];
        slider.classList.toggle("unset", !isGood);
      }
    });
    const row = make("div", { class: "number-row" }, make("label", { for: id }, say(name)), slider || null, box);
    return make("div", { class: "field" }, row, hint && make("p", { class: "hint", id: hint }, say(`${name}Hint`)));
  }

  set(name, value) {
    if (value === undefined) delete this.owner.settings.sampling[name];
    else this.owner.settings.sampling[name] = value;
    this.owner.change();
  }

  looks() {
    return group(
      "looks",
      this.toggle("probabilities", "probabilitiesHint"),
      this.toggle("tint"),
      this.toggle("markdown"),
    );
  }

  toggle(name, hint) {
    const box = make("input", { type: "checkbox", id: `set-${name}`, role: "switch", "aria-describedby": hint && `hint-${name}` });
    box.checked = this.owner.settings[name];
    box.addEventListener("change", () => {
      this.owner.settings[name] = box.checked;
      this.owner.change({ isLook: true });
    });
    return make(
      "div",
      { class: "field" },
      make("div", { class: "toggle-row" }, make("label", { for: `set-${name}` }, say(name)), box),
      hint && make("p", { class: "hint", id: `hint-${name}` }, say(hint)),
    );
  }

  access() {
    const box = make("input", { type: "password", id: "set-key", autocomplete: "off", spellcheck: "false", "aria-describedby": "hint-key" });
    box.value = this.owner.settings.key;
    box.addEventListener("input", () => {
      this.owner.settings.key = box.value.trim();
      this.owner.change({ isKey: true });
    });
    const show = make("button", { type: "button", class: "small", "aria-pressed": "false" }, say("show"));
    show.addEventListener("click", () => {
      const isHidden = box.type === "password";
      box.type = isHidden ? "text" : "password";
      show.setAttribute("aria-pressed", String(isHidden));
    });
    const row = make("div", { class: "key-row" }, box, show);
    return group("access", field("set-key", say("key"), row, "hint-key", say("keyHint")));
  }
}

function group(name, ...children) {
  return make("fieldset", { class: "group" }, make("legend", {}, say(name)), ...children);
}

function field(id, label, control, hintId, hint) {
  return make("div", { class: "field" }, make("label", { for: id }, label), control, hint && make("p", { class: "hint", id: hintId }, hint));
}

/** The card of keyboard shortcuts. */
export function openShortcuts() {
  const dialog = byId("shortcuts");
  const keys = [
    ["Enter", say("send")],
    ["Shift Enter", `${say("enter")} ↵`],
    ["Esc", say("stop")],
    ["Alt N", say("newChat")],
    ["Alt J", say("keyFocus")],
    ["Alt L", say("keyList")],
    ["Alt S", say("settings")],
    ["Alt R", say("keyAgain")],
    ["↑", say("keyEditLast")],
    ["← →", say("keyWalk")],
    ["Alt /", say("shortcuts")],
  ];
  const rows = keys.map(([key, words]) => make("div", {}, make("dt", {}, ...key.split(" ").map((part) => make("kbd", {}, part))), make("dd", {}, words)));
  dialog.replaceChildren(
    make(
      "header",
      { class: "sheet-head" },
      make("h2", { id: "shortcuts-title" }, say("shortcuts")),
      iconButton("close", say("close"), () => dialog.close()),
    ),
    make("dl", { class: "keys" }, ...rows),
  );
  dialog.onclick = (event) => event.target === dialog && dialog.close();
  if (!dialog.open) dialog.showModal();
}
