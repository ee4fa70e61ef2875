// One answer on its way: asks the server, files what arrives, measures how fast.

import { streamAnswer } from "./api.js";
import { chatMessages, joinedText } from "./conversation.js";
import { PieceFiler } from "./tokens.js";

const TOP = 5;
const LEAST_SECONDS = 0.02; // what arrives all at once has no rate
export const SAMPLING = [
  "temperature",
  "top_p",
  "top_k",
  "min_p",
  "max_tokens",
  "repetition_penalty",
  "presence_penalty",
  "frequency_penalty",
  "seed",
];

/** What is sent to the server for an answer to the message `parent`, or for the rest of the answer `open`. */
export function requestFor(conversation, parent, settings, model, open = null) {
  const body = { model, stream_options: { include_usage: true } };
  for (const name of SAMPLING) {
    if (Number.isFinite(settings.sampling[name])) body[name] = settings.sampling[name];
  }
  const stop = (settings.sampling.stop ?? "").split("\n").filter((line) => line !== "");
  if (stop.length) body.stop = stop;
  if (conversation.mode === "text") {
    if (settings.probabilities) body.logprobs = TOP;
    return { path: "v1/completions", body: { ...body, prompt: joinedText(conversation, parent) } };
  }
  if (settings.probabilities) Object.assign(body, { logprobs: true, top_logprobs: TOP });
  if (settings.overflow !== "refuse") body.context_policy = settings.overflow;
  if (open) Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
  return { path: "v1/chat/completions", body: { ...body, messages: chatMessages(conversation, open ?? parent) } };
}

/** Streams into `message`, behind the text that it has, until the end; `onGrow(text)` after each arrival. */
export class AnswerStream {
  constructor(conversation, message, { settings, model, onGrow }) {
    Object.assign(this, { conversation, message, settings, onGrow });
    this.isRest = message.text !== "";
    this.request = requestFor(conversation, message.parent, settings, model, this.isRest ? message.id : null);
    this.abort = new AbortController();
    message.pieces = this.isRest ? (message.pieces ?? []) : [];
    this.before = (this.isRest && message.stats?.tokens) || 0;
    message.stats = this.isRest ? { tokens: this.before } : {};
    delete message.end;
    this.filer = new PieceFiler(message.pieces, message.text.length);
    this.began = performance.now();
    this.count = 0;
  }

  /** Resolves when the answer is complete or was stopped; throws an ApiError otherwise. */
  async run() {
    try {
      await streamAnswer(this.request.path, {
        key: this.settings.key,
        body: this.request.body,
        signal: this.abort.signal,
        onPart: (part) => this.take(part),
      });
      this.message.end ??= "stop";
    } catch (error) {
      if (error.name !== "AbortError") {
        this.message.end = "broken";
        throw error;
      }
      this.message.end = "stopped";
    }
  }

  stop() {
    this.abort.abort();
  }

  take({ text, tokens, finish, usage, isShortened }) {
    const { message } = this;
    if (isShortened) message.stats.isShortened = true;
    if (text || tokens.length) {
      const now = performance.now();
      this.firstAt ??= now;
      this.lastAt = now;
      this.count += tokens.length || 1;
      message.text += text;
      this.filer.push(text, tokens);
    }
    if (finish) message.end = finish;
    this.measure(usage);
    this.onGrow(text);
  }

  measure(usage) {
    const { stats } = this.message;
    if (this.firstAt === undefined) return;
    const count = usage?.completion_tokens ?? this.count;
    stats.tokens = this.before + count;
    stats.first = (this.firstAt - this.began) / 1000;
    const seconds = (this.lastAt - this.firstAt) / 1000;
    if (count > 1 && seconds > LEAST_SECONDS) stats.rate = (count - 1) / seconds;
  }
}
