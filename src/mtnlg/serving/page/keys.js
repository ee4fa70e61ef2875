// Which click and which key does what.

import { pathOf } from "./conversation.js";
import { byId } from "./dom.js";
import { openShortcuts } from "./settings.js";

/** Connect the page's fixed controls and its shortcuts with the app. */
export function listen(app) {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (app.isStreaming(app.conversation)) app.stop();
    else app.send();
  });
  byId("prompt").addEventListener("keydown", (event) => onPromptKey(app, event));
  byId("prompt").addEventListener("input", () => app.fitPrompt());
  byId("model").addEventListener("change", (event) => app.chooseModel(event.target.value));
  byId("open-settings").addEventListener("click", () => app.sheet.open());
  byId("help").addEventListener("click", () => openShortcuts());
  byId("theme").addEventListener("click", () => app.nextTheme());
  byId("language").addEventListener("click", () => app.otherLanguage());
  for (const button of document.querySelectorAll(".modes [data-mode]")) {
    button.addEventListener("click", () => app.chooseMode(button.dataset.mode));
    button.addEventListener("keydown", (event) => onModeKey(app, event));
  }
  document.addEventListener("keydown", (event) => onKey(app, event));
}

function onPromptKey(app, event) {
  if (event.isComposing || event.keyCode === 229) return; // an input method is choosing characters
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    app.send();
  } else if (event.key === "ArrowUp" && !event.target.value && !app.isStreaming(app.conversation)) {
    const last = pathOf(app.conversation).findLast(({ role }) => role === "user");
    if (!last) return;
    event.preventDefault();
    app.view.beginEdit(last);
  }
}

function onModeKey(app, event) {
  if (!["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"].includes(event.key)) return;
  event.preventDefault();
  const mode = event.target.dataset.mode === "chat" ? "text" : "chat";
  app.chooseMode(mode);
  byId(`mode-${mode}`).focus();
}

function onKey(app, event) {
  const hasDialog = document.querySelector("dialog[open]") !== null;
  if (event.key === "Escape" && !hasDialog && app.isStreaming(app.conversation)) app.stop();
  if (!event.altKey || event.ctrlKey || event.metaKey || hasDialog) return;
  // by place on the keyboard: with Alt, some layouts write other letters
  const act = {
    KeyN: () => app.begin(),
    KeyJ: () => byId("prompt").focus(),
    KeyL: () => app.sidebar.focus(),
    KeyS: () => app.sheet.open(),
    KeyR: () => app.answerAgain(),
    Slash: () => openShortcuts(),
  }[event.code];
  if (!act) return;
  event.preventDefault();
  act();
}
