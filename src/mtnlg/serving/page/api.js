// The server's API: models, and answers as a stream. Paths are relative, so that the page works below
// any prefix a proxy puts before it.

/** A failure, with what the page needs to explain it. */
export class ApiError extends Error {
  constructor(kind, { status = 0, message = "", retryAfter = null } = {}) {
    super(message || kind);
    Object.assign(this, { kind, status, detail: message, retryAfter });
  }
}

const address = (path) => new URL(path, document.baseURI);

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function ask(path, { key, body, signal } = {}) {
  let response;
  try {
    response = await fetch(address(path), {
      method: body ? "POST" : "GET",
      headers: headers(key),
      body: body ? JSON.stringify(body) : undefined,
      signal,
      cache: "no-store",
      credentials: "same-origin",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("gone", { message: "" });
  }
  if (!response.ok) throw await failureOf(response, key);
  return response;
}

/** Seconds that a Retry-After header asks to wait (a number or a date); null without one. */
export function retryAfterSeconds(value, now = Date.now()) {
  if (!value) return null;
  const seconds = /^\s*\d+(\.\d+)?\s*$/.test(value) ? Number(value) : (Date.parse(value) - now) / 1000;
  return Number.isFinite(seconds) ? Math.min(Math.max(Math.ceil(seconds), 0), 3600) : null;
}

async function failureOf(response, key) {
  let error = {};
  try {
    const body = await response.json();
    error = typeof body.error === "object" && body.error !== null ? body.error : { message: body.error ?? body.detail };
  } catch {
    error = {}; // a proxy's page instead of JSON: the status says enough
  }
  const facts = {
    status: response.status,
    message: typeof error.message === "string" ? error.message : "",
    retryAfter: retryAfterSeconds(response.headers.get("Retry-After")),
  };
  return new ApiError(kindOf(response.status, error, key), facts);
}

function kindOf(status, error, key) {
  if (status === 401) return key ? "badKey" : "key";
  if (status === 403) return "forbidden";
  if (status === 404) return "model";
  if (status === 429) return error.code === "insufficient_quota" ? "quota" : "busy";
  if (status === 502 || status === 503 || status === 504) return "starting";
  if (error.code === "context_length_exceeded") return "long";
  return status < 500 ? "request" : "server";
}

/** The models that the server has, as it describes them. */
export async function listModels(key) {
  const body = await (await ask("v1/models", { key })).json();
  return Array.isArray(body.data) ? body.data : [];
}

/**
 * Stream an answer.
 *
 * @param path `v1/chat/completions` or `v1/completions`
 * @param options key, body, signal, and onPart({text, tokens, finish, usage, isShortened}) for each arrival
 */
export async function streamAnswer(path, { key, body, signal, onPart }) {
  const response = await ask(path, { key, body: { ...body, stream: true }, signal });
  let isDone = false;
  if (response.headers.get("X-Context-Notice")) onPart({ text: "", tokens: [], isShortened: true });
  try {
    for await (const data of serverEvents(response.body)) {
      if (data === "[DONE]") {
        isDone = true;
        break;
      }
      onPart(partOf(JSON.parse(data)));
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("cut");
  }
  if (!isDone) throw new ApiError("cut");
}

/** The data of each server-sent event, as it arrives, whatever the borders of the network's pieces. */
export async function* serverEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

function partOf(chunk) {
  if (chunk.error) {
    const message = typeof chunk.error === "string" ? chunk.error : chunk.error.message;
    throw new ApiError("cut", { message: message ?? "" });
  }
  const choice = chunk.choices?.[0];
  const text = choice?.delta?.content ?? choice?.text ?? "";
  return { text, tokens: tokensOf(choice?.logprobs), finish: choice?.finish_reason ?? null, usage: chunk.usage ?? null };
}

/** Tokens as [text, logprob, [[text, logprob], ...]] from either of the API's two forms. */
export function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (Array.isArray(logprobs.content)) {
    return logprobs.content.map((entry) => [
      entry.token,
      entry.logprob,
      (entry.top_logprobs ?? []).map((other) => [other.token, other.logprob]),
    ]);
  }
  return (logprobs.tokens ?? []).map((token, at) => [
    token,
    logprobs.token_logprobs?.[at] ?? null,
    Object.entries(logprobs.top_logprobs?.[at] ?? {}).sort((one, other) => other[1] - one[1]),
  ]);
}
