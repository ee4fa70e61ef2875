// Tables in Markdown: a row of names, a row of dashes, and rows of cells between bars.

const DASHES = /^ {0,3}\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;

/** Cells of a row with their places in the source. A bar behind a backslash or inside of code is text. */
function cellsOf(text, offset) {
  const cells = [];
  let start = 0;
  let isCode = false;
  for (let at = 0; at <= text.length; at += 1) {
    if (text[at] === "\\") at += 1;
    else if (text[at] === "`") isCode = !isCode && text.includes("`", at + 1);
    else if (at === text.length || (text[at] === "|" && !isCode)) {
      cells.push(trimmed(text, start, at, offset));
      start = at + 1;
    }
  }
  if (text.trimStart().startsWith("|")) cells.shift();
  if (cells.length && cells.at(-1).start === cells.at(-1).end && text.trimEnd().endsWith("|")) cells.pop();
  return cells;
}

function trimmed(text, start, end, offset) {
  const part = text.slice(start, end);
  const first = start + part.length - part.trimStart().length;
  return { start: offset + Math.min(first, end), end: offset + Math.max(Math.min(first, end), start + part.trimEnd().length) };
}

/** Where a row of dashes follows a line of names, turn that line into a table. Returns whether it did. */
export function beginTable(blocks, text, line, source) {
  if (!DASHES.test(text) || !text.includes("|")) return false;
  const last = blocks.at(-1);
  const start = source.lastIndexOf("\n", last.end - 1) + 1;
  const head = source.slice(start, last.end);
  const names = head.includes("|") && start >= last.start ? cellsOf(head, start) : [];
  const sides = cellsOf(text, 0).map((cell) => sideOf(text.slice(cell.start, cell.end)));
  if (names.length === 0 || names.length !== sides.length) return false;
  if (start > last.start) last.end = start - 1;
  else blocks.pop();
  blocks.push({ kind: "table", start, end: line.end, sides, names, rows: [] });
  return true;
}

function sideOf(dashes) {
  if (!dashes.endsWith(":")) return "";
  return dashes.startsWith(":") ? "middle" : "right";
}

export function addRow(table, text, line) {
  table.rows.push(cellsOf(text, line.start));
  table.end = line.end;
}

/** The element of a table, in a box that can be scrolled where it is too wide. */
export function renderTable(table, inline, make) {
  const row = (tag, cells) =>
    make("tr", {}, ...table.sides.map((side, at) => {
      const node = make(tag, { class: side || null, scope: tag === "th" ? "col" : null });
      if (cells[at]) inline(node, cells[at].start, cells[at].end);
      return node;
    }));
  const body = table.rows.map((cells) => row("td", cells));
  return make(
    "div",
    { class: "table", tabindex: "0" },
    make("table", {}, make("thead", {}, row("th", table.names)), make("tbody", {}, ...body)),
  );
}
