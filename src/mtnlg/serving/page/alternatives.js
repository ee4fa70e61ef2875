// The bubble with a token's alternatives: under the pointer, at a tap, or by arrow keys on an answer.

import { byId } from "./dom.js";
import { alternativesOf, spokenAlternatives } from "./tokens.js";

/** `piecesOf(element)` gives the pieces of the answer that an element belongs to. */
export class Alternatives {
  constructor(root, piecesOf, announce) {
    this.root = root;
    this.piecesOf = piecesOf;
    this.announce = announce;
    this.bubble = byId("alternatives");
    this.marked = [];
    root.addEventListener("pointerover", (event) => this.point(event.target));
    root.addEventListener("pointerleave", () => this.hide());
    root.addEventListener("click", (event) => this.point(event.target));
    root.addEventListener("keydown", (event) => this.walk(event));
    root.addEventListener("focusout", () => this.hide());
    byId("scroll").addEventListener("scroll", () => this.hide(), { passive: true });
  }

  point(target) {
    const token = target.closest?.(".token");
    if (token) this.showFor(token);
    else this.hide();
  }

  walk(event) {
    const body = event.target;
    if (!body.matches?.(".body") || event.altKey || event.ctrlKey || event.metaKey) return;
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
    const tokens = Array.from(body.querySelectorAll(".token"));
    if (event.key === "Escape" && !this.bubble.hidden) {
      this.hide();
      event.stopPropagation();
    }
    if (!step || tokens.length === 0) return;
    event.preventDefault();
    const now = tokens.findIndex((token) => token === this.at);
    const next = now < 0 ? (step > 0 ? 0 : tokens.length - 1) : Math.min(Math.max(now + step, 0), tokens.length - 1);
    this.showFor(tokens[next]);
    tokens[next].scrollIntoView({ block: "nearest" });
    this.announce(spokenAlternatives(this.tokensOf(tokens[next])));
  }

  tokensOf(token) {
    return this.piecesOf(token)?.[Number(token.dataset.piece)]?.[1] ?? [];
  }

  showFor(token) {
    const found = this.tokensOf(token);
    if (found.length === 0) return;
    this.hide();
    this.at = token;
    const body = token.closest(".body");
    this.marked = Array.from(body.querySelectorAll(`.token[data-piece="${token.dataset.piece}"]`));
    for (const node of this.marked) node.classList.add("marked");
    this.bubble.replaceChildren(...alternativesOf(found));
    this.bubble.hidden = false;
    this.place(token.getClientRects()[0] ?? token.getBoundingClientRect());
  }

  place(rect) {
    const { offsetWidth: width, offsetHeight: height } = this.bubble;
    const margin = 8;
    const left = Math.min(Math.max(rect.left + rect.width / 2 - width / 2, margin), innerWidth - width - margin);
    const isBelow = rect.bottom + height + 2 * margin < innerHeight; // over what comes after, not what was read
    this.bubble.style.left = `${Math.max(left, margin)}px`;
    this.bubble.style.top = `${isBelow ? rect.bottom + margin : rect.top - height - margin}px`;
  }

  hide() {
    this.bubble.hidden = true;
    this.at = null;
    for (const node of this.marked) node.classList.remove("marked");
    this.marked = [];
  }
}
