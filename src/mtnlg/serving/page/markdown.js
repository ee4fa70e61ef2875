// A small safe part of Markdown, as elements. Every piece of text keeps its place in the source, so that
// tokens can be found under the pointer; `put(parent, start, end)` adds source[start:end] as text.

import { renderInline } from "./inline.js";
import { addRow, beginTable, renderTable } from "./table.js";

const FENCE = /^( {0,12})(```+|~~~+)\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(?=\S)/;
const BULLET = /^( *)([-*+•])\s+(?=\S)/;
const NUMBER = /^( *)(\d{1,9})(?:[.)]\s+|、\s*)(?=\S)/;
const QUOTE = /^ {0,3}> ?/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const TASK = /^\[([ xX])\] /;
const MOST_DEPTH = 6;

/** Lines with their places: {start, end} without the line break. */
function linesOf(source) {
  const lines = [];
  let start = 0;
  for (;;) {
    const at = source.indexOf("\n", start);
    if (at < 0) break;
    lines.push({ start, end: at });
    start = at + 1;
  }
  lines.push({ start, end: source.length });
  return lines;
}

/** Cut a text into blocks: {kind, start, end, ...}. A fence that is still open runs to the end. */
export function blocksOf(source) {
  const blocks = [];
  const headings = []; // open levels, to show them without gaps
  let open = null; // the fence that has begun
  for (const line of linesOf(source)) {
    const text = source.slice(line.start, line.end);
    if (open) {
      if (text.trim().startsWith(open.fence) && /^[`~]+$/.test(text.trim())) open = null;
      else {
        const indent = Math.min(open.indent, text.length - text.trimStart().length);
        open.lines.push({ start: line.start + indent, end: line.end });
        open.end = line.end;
      }
      continue;
    }
    const fence = FENCE.exec(text);
    if (fence) {
      open = { kind: "code", indent: fence[1].length, fence: fence[2], language: fence[3], start: line.end + 1, end: line.end, lines: [] };
      blocks.push(open);
      continue;
    }
    addLine(blocks, text, line, headings, source);
  }
  return blocks;
}

function addLine(blocks, text, line, headings, source) {
  const last = blocks.at(-1);
  if (!text.trim()) {
    if (last && last.kind !== "gap") blocks.push({ kind: "gap", start: line.start, end: line.end });
    return;
  }
  if (last?.kind === "table" && text.includes("|")) return addRow(last, text, line);
  if (last?.kind === "text" && beginTable(blocks, text, line, source)) return;
  const heading = HEADING.exec(text);
  const item = RULE.test(text) ? null : (BULLET.exec(text) ?? NUMBER.exec(text));
  const quote = QUOTE.exec(text);
  if (RULE.test(text)) blocks.push({ kind: "rule", start: line.start, end: line.end });
  else if (heading) blocks.push({ kind: "heading", level: levelOf(headings, heading[1].length), start: line.start + heading[0].length, end: line.end });
  else if (item) addItem(blocks, item, line);
  else if (last?.kind === "list" && /^\s{2,}/.test(text)) {
    last.items.at(-1).more.push({ start: line.start + text.length - text.trimStart().length, end: line.end });
    last.end = line.end;
  } else if (quote) {
    const piece = { start: line.start + quote[0].length, end: line.end };
    if (last?.kind === "quote") {
      last.items.push(piece);
      last.end = line.end;
    } else blocks.push({ kind: "quote", items: [piece], start: line.start, end: line.end });
  } else if (last?.kind === "text") last.end = line.end;
  else blocks.push({ kind: "text", start: line.start, end: line.end });
}

/** Below the page's own headings and without gaps, whatever levels the model chose. */
function levelOf(open, own) {
  while (open.length && open.at(-1).own >= own) open.pop();
  const shown = Math.min(open.length ? open.at(-1).shown + 1 : 3, 6);
  open.push({ own, shown });
  return shown;
}

function addItem(blocks, found, line) {
  const number = /\d/.test(found[2]) ? Number(found[2]) : null;
  const item = { indent: found[1].length, isNumber: number !== null, number, start: line.start + found[0].length, end: line.end, more: [] };
  const near = blocks.at(-1)?.kind === "gap" ? blocks.at(-2) : blocks.at(-1);
  const isNested = near?.kind === "list" && item.indent > near.items[0].indent + 1;
  if (near?.kind === "list" && (isNested || near.items[0].isNumber === item.isNumber)) {
    if (blocks.at(-1) !== near) blocks.pop();
    near.items.push(item);
    near.end = line.end;
  } else blocks.push({ kind: "list", items: [item], start: line.start, end: line.end });
}

/** Make the element of one block. */
export function renderBlock(source, block, put, make) {
  const inline = (node, start, end) => renderInline(source, start, end, node, put, make);
  if (block.kind === "code") {
    const code = make("code", {});
    block.lines.forEach((line, at) => put(code, line.start, line.end + (at < block.lines.length - 1 ? 1 : 0)));
    return make("figure", { class: "code", data: { language: block.language ?? "" } }, make("pre", { tabindex: "0" }, code));
  }
  if (block.kind === "rule") return make("hr");
  if (block.kind === "table") return renderTable(block, inline, make);
  if (block.kind === "list") return renderList(source, block.items, inline, make);
  if (block.kind === "quote") {
    const node = make("blockquote", {});
    for (const item of block.items) {
      node.append(make("p", {}));
      inline(node.lastChild, item.start, item.end);
    }
    return node;
  }
  const node = make(block.kind === "heading" ? `h${block.level}` : "p", {});
  inline(node, block.start, block.end);
  return node;
}

/** Items in lists inside of lists, by how far they are moved in. */
function renderList(source, items, inline, make) {
  const listFor = (item) => {
    const first = item.isNumber && item.number !== 1 ? { start: String(item.number) } : {};
    return make(item.isNumber ? "ol" : "ul", first);
  };
  const open = [{ indent: items[0].indent, node: listFor(items[0]) }];
  const root = open[0].node;
  for (const item of items) {
    while (open.length > 1 && item.indent < open.at(-1).indent) open.pop();
    const parent = open.at(-1);
    const isDeeper = item.indent > parent.indent + 1 && parent.node.lastChild && open.length < MOST_DEPTH;
    if (isDeeper) open.push({ indent: item.indent, node: parent.node.lastChild.appendChild(listFor(item)) });
    else if (open.length > 1 && (parent.node.tagName === "OL") !== item.isNumber) {
      parent.node.after(listFor(item));
      parent.node = parent.node.nextSibling;
    }
    open.at(-1).node.append(listItem(source, item, inline, make));
  }
  return root;
}

function listItem(source, item, inline, make) {
  const node = make("li", {});
  const task = TASK.exec(source.slice(item.start, item.end));
  if (task) node.classList.add("task");
  if (task) node.append(task[1] === " " ? "☐ " : "☑ ");
  inline(node, item.start + (task?.[0].length ?? 0), item.end);
  for (const line of item.more) {
    node.append("\n");
    inline(node, line.start, line.end);
  }
  return node;
}
