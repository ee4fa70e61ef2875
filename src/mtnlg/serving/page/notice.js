// Failures, said kindly, with what can be done about them.

import { byId, make } from "./dom.js";
import { say } from "./words.js";

const WORDS = {
  key: "errorKey",
  badKey: "errorBadKey",
  forbidden: "errorForbidden",
  busy: "errorBusy",
  quota: "errorQuota",
  starting: "errorStarting",
  gone: "errorGone",
  cut: "errorCut",
  long: "errorLong",
  model: "errorModel",
  request: "errorRequest",
  server: "errorServer",
};
// What the server itself says helps only where it is about the request.
const QUOTED = new Set(["forbidden", "request", "long", "model", "quota", "server", "cut"]);
const WAITING = new Set(["busy", "starting"]);
const AWAY = new Set(["gone", "starting"]);
const MOST_WAITS = 5;

export class Notice {
  /** `actions`: openSettings(id), begin(), canDrop(), dropOldest(). */
  constructor(actions) {
    this.actions = actions;
    this.place = byId("notice");
    this.timer = null;
  }

  clear() {
    clearInterval(this.timer);
    this.place.replaceChildren();
  }

  /** Explain a failure. `retry` does again what failed; `waits` counts how often that was done by itself.
   * `again`: seconds after which to look for a server that cannot be reached; null does not. */
  show(error, retry, waits = 0, again = null) {
    this.clear();
    const words = say(WORDS[error.kind] ?? "errorServer");
    const quote = QUOTED.has(error.kind) && error.detail ? say("saidServer", { message: error.detail }) : null;
    const buttons = make("div", { class: "notice-buttons" });
    this.place.append(
      make("div", { class: "notice", data: { kind: error.kind } }, make("p", {}, words), quote && make("p", { class: "quote" }, quote), buttons),
    );
    buttons.append(...this.choices(error, retry));
    if (WAITING.has(error.kind) && error.retryAfter !== null && waits < MOST_WAITS) {
      this.countDown(buttons, error.retryAfter, () => retry(waits + 1));
    } else if (AWAY.has(error.kind) && again !== null) this.countDown(buttons, again, () => retry(waits + 1));
    this.place.scrollIntoView({ block: "nearest" });
  }

  choices(error, retry) {
    const button = (name, act, isMain) =>
      make("button", { type: "button", class: isMain ? "small primary" : "small", on: { click: act } }, say(name));
    const again = (isMain) => button("tryAgain", () => retry(0), isMain);
    if (error.kind === "key" || error.kind === "badKey") {
      return [button("enterKey", () => this.actions.openSettings("set-key"), true), again(false)];
    }
    if (error.kind === "long") {
      const drop = () => {
        this.actions.dropOldest();
        retry(0);
      };
      const canDrop = this.actions.canDrop();
      const anew = button("startAnew", () => this.actions.begin(), !canDrop);
      return [...(canDrop ? [button("dropOldest", drop, true)] : []), anew, again(false)];
    }
    if (error.kind === "request") {
      return [button("openSettings", () => this.actions.openSettings("set-temperature"), true), again(false)];
    }
    return [again(true)];
  }

  /** Try again by itself when the server said when, unless the visitor does not want to wait. */
  countDown(buttons, seconds, act) {
    let left = Math.max(seconds, 1);
    const words = make("span", { class: "hint", "aria-live": "off" }, say("againIn", { seconds: left }));
    const stop = make("button", { type: "button", class: "small" }, say("wait"));
    stop.addEventListener("click", () => {
      clearInterval(this.timer);
      stop.remove();
      words.remove();
    });
    buttons.append(stop, words);
    this.timer = setInterval(() => {
      left -= 1;
      if (left > 0) words.textContent = say("againIn", { seconds: left });
      else {
        this.clear();
        act();
      }
    }, 1000);
  }
}
