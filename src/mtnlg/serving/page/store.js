// What the browser keeps: conversations in IndexedDB (they grow large with probabilities), settings in
// localStorage. Where a browser allows neither, the page works and forgets.

import { dropLeaf } from "./conversation.js";

const DATABASE = "mtnlg";
const TABLE = "conversations";
const SETTINGS = "mtnlg.settings";

export const DEFAULT_SETTINGS = {
  language: "auto",
  theme: "auto",
  key: "",
  model: "",
  mode: "auto", // chat where the model was made for it
  system: "",
  probabilities: true,
  tint: false,
  markdown: true,
  overflow: "refuse", // or "drop", "summarise": what becomes of a conversation longer than the context
  sampling: {},
};

export function loadSettings() {
  let found = {};
  try {
    found = JSON.parse(localStorage.getItem(SETTINGS) ?? "{}");
  } catch {
    found = {}; // blocked, or written by something else
  }
  const settings = { ...DEFAULT_SETTINGS, sampling: {} };
  for (const [name, value] of Object.entries(DEFAULT_SETTINGS)) {
    if (typeof found?.[name] === typeof value && found[name] !== null) settings[name] = found[name];
  }
  return settings;
}

/** Keep the settings. Returns whether the browser did. */
export function saveSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
    return true;
  } catch {
    return false;
  }
}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** An answer without an end was on its way when its page was closed; of some nothing had come. */
function closeAnswers(conversation) {
  for (const message of Object.values(conversation.messages)) {
    if (message.role !== "assistant" || message.end) continue;
    if (message.text) message.end = "broken";
    else dropLeaf(conversation, message);
  }
}

/** The conversations of this browser. */
export class ConversationStore {
  constructor() {
    this.database = null;
  }

  /** Returns whether conversations will outlast a reload. */
  async open() {
    try {
      const request = indexedDB.open(DATABASE, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
      this.database = await done(request);
      return true;
    } catch {
      return false;
    }
  }

  async all() {
    if (!this.database) return [];
    const found = await done(this.database.transaction(TABLE).objectStore(TABLE).getAll());
    for (const conversation of found) closeAnswers(conversation);
    return found.sort((one, other) => other.changed - one.changed);
  }

  async save(conversation) {
    if (!this.database) return;
    const change = this.database.transaction(TABLE, "readwrite");
    // a copy through JSON: what is being streamed into must not change under the transaction
    await done(change.objectStore(TABLE).put(JSON.parse(JSON.stringify(conversation))));
  }

  async remove(id) {
    if (!this.database) return;
    await done(this.database.transaction(TABLE, "readwrite").objectStore(TABLE).delete(id));
  }
}
