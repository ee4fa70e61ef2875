// Which piece of an answer's text came from which tokens, and what else they could have been.
// An answer keeps `pieces`: [[length of text, [[token, logprob, [[token, logprob], ...]], ...]], ...].
// Mostly one token a piece; a character made of several tokens is one piece of several.

import { make } from "./dom.js";
import { say } from "./words.js";

/** Files tokens with the text that they made, as both arrive. */
export class PieceFiler {
  /** `length`: of the text that is there already; what the pieces do not cover becomes one without tokens. */
  constructor(pieces, length = 0) {
    this.pieces = pieces;
    const known = pieces.reduce((sum, [size]) => sum + size, 0);
    if (known < length) pieces.push([length - known, []]);
    this.pending = []; // tokens whose text is still held back
  }

  push(text, tokens) {
    this.pending.push(...tokens);
    if (!text) return;
    if (this.pending.length > 1 && this.pending.map(([token]) => token).join("") === text) {
      for (const token of this.pending) if (token[0]) this.pieces.push([token[0].length, [token]]);
    } else this.pieces.push([text.length, this.pending]);
    this.pending = [];
  }
}

/** A `put` for the Markdown renderer: text as spans, one for each piece, so that each can be pointed at. */
export function putPieces(source, pieces, tint) {
  const borders = [0];
  for (const [length] of pieces) borders.push(borders.at(-1) + length);
  let at = 0; // text is mostly asked for in order: go on from the last place
  return (parent, start, end) => {
    if (start < borders[at]) at = 0;
    while (at < pieces.length && borders[at + 1] <= start) at += 1;
    for (let piece = at; start < end; piece += 1) {
      const stop = piece < pieces.length ? Math.min(end, borders[piece + 1]) : end;
      parent.append(piece < pieces.length ? tokenSpan(source.slice(start, stop), piece, pieces[piece][1], tint) : source.slice(start, end));
      start = stop;
    }
  };
}

function tokenSpan(text, piece, tokens, tint) {
  if (tokens.length === 0) return text;
  const node = make("span", { class: "token", data: { piece: String(piece) } }, text);
  if (tint) node.style.setProperty("--doubt", (1 - probabilityOf(tokens)).toFixed(3));
  return node;
}

function probabilityOf(tokens) {
  return Math.exp(tokens.reduce((sum, [, logprob]) => sum + (logprob ?? 0), 0));
}

/** A token as something to see: spaces and line breaks are drawn, and a part of a character is its bytes. */
export function visible(token) {
  return token.replace(/^bytes:/, "").replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
}

export function percent(logprob) {
  if (logprob === null || logprob === undefined) return "–";
  const value = 100 * Math.exp(logprob);
  return value >= 99.95 ? "100%" : value >= 10 ? `${value.toFixed(0)}%` : value >= 0.1 ? `${value.toFixed(1)}%` : "<0.1%";
}

/** The list of alternatives of one piece. */
export function alternativesOf(tokens) {
  const lists = tokens.map(([token, logprob, others]) => {
    const rows = others.some(([other]) => other === token) ? others : [...others, [token, logprob]];
    return make(
      "ol",
      { class: "options" },
      ...rows.map(([other, value]) => optionRow(other, value, other === token)),
    );
  });
  return [make("p", { class: "options-title" }, say("alternatives")), ...lists];
}

function optionRow(token, logprob, isChosen) {
  const bar = make("span", { class: "bar" });
  bar.style.setProperty("--share", String(Math.exp(logprob ?? -Infinity)));
  return make(
    "li",
    { class: isChosen ? "option chosen" : "option" },
    make("span", { class: "option-token" }, visible(token)),
    bar,
    make("span", { class: "option-share" }, percent(logprob)),
    isChosen ? make("span", { class: "hidden" }, say("chosen")) : null,
  );
}

/** The same as one sentence, for those who listen. */
export function spokenAlternatives(tokens) {
  return tokens
    .map(([token, logprob, others]) => {
      const rest = others.filter(([other]) => other !== token).map(([other, value]) => `${visible(other)} ${percent(value)}`);
      return `${visible(token)} ${percent(logprob)}${rest.length ? `; ${rest.join(", ")}` : ""}`;
    })
    .join(" · ");
}
