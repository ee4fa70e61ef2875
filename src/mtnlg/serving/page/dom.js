// Small helpers for making elements. Text goes in as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

/** Make an element: attributes by name, `on` for listeners, children as nodes or strings. */
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name === "data") Object.assign(node.dataset, value);
    else if (name in node && typeof value !== "string") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** One of the page's icons. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows an icon and has a name. */
export function iconButton(name, label, onClick, attributes = {}) {
  return make(
    "button",
    { type: "button", class: "icon", "aria-label": label, title: label, on: { click: onClick }, ...attributes },
    icon(name),
  );
}

export const byId = (id) => document.getElementById(id);

/** Hand the visitor a file. */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

let toastTimer;

/** Say something briefly, with one thing to do about it where there is one. */
export function toast(text, action) {
  const place = byId("toast");
  clearTimeout(toastTimer);
  const hide = () => {
    place.hidden = true;
    place.replaceChildren();
  };
  place.hidden = false;
  place.replaceChildren(make("span", {}, text));
  if (action) {
    const act = () => {
      hide();
      action.act();
    };
    place.append(make("button", { type: "button", class: "link", on: { click: act } }, action.label));
  }
  toastTimer = setTimeout(hide, action ? 12_000 : 4_000);
}
