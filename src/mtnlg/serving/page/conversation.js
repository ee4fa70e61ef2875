// A conversation: messages as a tree, so that editing and answering again lose nothing. `leaf` is the
// end of the branch that is shown.

export const ROLES = ["user", "assistant"];

/** A random name that is free in practice; works on plain http too, where crypto.randomUUID is missing. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(mode = "chat", system = "") {
  const now = Date.now();
  return { id: newId(), title: "", mode, system, messages: {}, leaf: null, created: now, changed: now };
}

/** The messages from the first to the leaf. */
export function pathOf(conversation, leaf = conversation.leaf) {
  const path = [];
  for (let at = leaf; at; at = conversation.messages[at]?.parent) {
    if (conversation.messages[at]) path.unshift(conversation.messages[at]);
  }
  return path;
}

/** Add a message behind `parent` and show the branch that ends with it. */
export function addMessage(conversation, role, text, parent = conversation.leaf) {
  const message = { id: newId(), parent, role, text, created: Date.now() };
  conversation.messages[message.id] = message;
  conversation.leaf = message.id;
  conversation.changed = Date.now();
  if (!conversation.title && role === "user") conversation.title = titleOf(text);
  return message;
}

/** Messages with the same parent and role, oldest first: the versions of one turn. */
export function versionsOf(conversation, message) {
  return Object.values(conversation.messages)
    .filter((other) => other.parent === message.parent && other.role === message.role)
    .sort((one, other) => one.created - other.created);
}

/** Show the branch through `message`, down to its newest end. */
export function showVersion(conversation, message) {
  let leaf = message;
  for (;;) {
    const next = Object.values(conversation.messages).filter((other) => other.parent === leaf.id);
    if (next.length === 0) break;
    leaf = next.reduce((one, other) => (other.created >= one.created ? other : one));
  }
  conversation.leaf = leaf.id;
}

/** Take out one message that has no followers. */
export function dropLeaf(conversation, message) {
  delete conversation.messages[message.id];
  if (conversation.leaf === message.id) conversation.leaf = message.parent;
}

/** The first words of a text, as a title. */
export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0];
  const characters = Array.from(line);
  return characters.length > 48 ? `${characters.slice(0, 47).join("").trim()}…` : line;
}

/** What the model is sent: the chat's messages, or for `text` all of it joined. */
export function chatMessages(conversation, upTo) {
  const path = pathOf(conversation, upTo).map(({ role, text }) => ({ role, content: text }));
  return conversation.system.trim() ? [{ role: "system", content: conversation.system }, ...path] : path;
}

export function joinedText(conversation, upTo) {
  return pathOf(conversation, upTo).map(({ text }) => text).join("");
}

/** Conversations found in an exported file; anything that is not one is left out. */
export function readExport(text) {
  const found = JSON.parse(text);
  const list = Array.isArray(found?.conversations) ? found.conversations : [];
  return list.map(sound).filter(Boolean);
}

/** What a file of conversations holds. */
export function writeExport(conversations) {
  return JSON.stringify({ format: "mtnlg-conversations", version: 1, conversations }, null, 1);
}

const string = (value) => (typeof value === "string" ? value : "");
const time = (value) => (Number.isFinite(value) ? value : Date.now());

function sound(found) {
  if (typeof found !== "object" || found === null || typeof found.messages !== "object") return null;
  const conversation = newConversation(found.mode === "text" ? "text" : "chat", string(found.system));
  const id = /^[a-z0-9][\w-]{0,63}$/i;
  for (const message of Object.values(found.messages ?? {})) {
    if (!ROLES.includes(message?.role) || typeof message.text !== "string" || !id.test(message.id)) continue;
    const { parent, role, text, end, stats } = message;
    const pieces = Array.isArray(message.pieces) ? message.pieces : undefined;
    conversation.messages[message.id] = { id: message.id, parent: parent ?? null, role, text, end, stats, pieces, created: time(message.created) };
  }
  cutLoops(conversation);
  const last = Object.values(conversation.messages).sort((one, other) => one.created - other.created).pop();
  conversation.leaf = Object.hasOwn(conversation.messages, found.leaf) ? found.leaf : (last?.id ?? null);
  conversation.title = string(found.title).slice(0, 200);
  conversation.created = time(found.created);
  return last ? conversation : null;
}

/** A parent that is missing or comes after its child would let a walk to the root run for ever. */
function cutLoops(conversation) {
  for (const message of Object.values(conversation.messages)) {
    const seen = new Set([message.id]);
    let at = message;
    while (at.parent) {
      const parent = Object.hasOwn(conversation.messages, at.parent) && conversation.messages[at.parent];
      if (!parent || seen.has(parent.id)) {
        at.parent = null;
        break;
      }
      seen.add(parent.id);
      at = parent;
    }
  }
}
