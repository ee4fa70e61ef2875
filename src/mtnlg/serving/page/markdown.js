// A small safe part of Markdown, as elements. Every piece of text keeps its place in the source, so that
// tokens can be found under the pointer; `put(parent, start, end)` adds source[start:end] as text.

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(?=\S)/;
const BULLET = /^( {0,6})([-*+•])\s+(?=\S)/;
const NUMBER = /^( {0,6})(\d{1,9})(?:[.)]\s+|、\s*)(?=\S)/;
const QUOTE = /^ {0,3}> ?/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;

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
  let open = null; // the fence that has begun
  for (const line of linesOf(source)) {
    const text = source.slice(line.start, line.end);
    if (open) {
      if (text.trim().startsWith(open.fence) && /^[`~]+$/.test(text.trim())) open = null;
      else open.end = line.end;
      continue;
    }
    const fence = FENCE.exec(text);
    if (fence) {
      open = { kind: "code", fence: fence[1], language: fence[2], start: line.end + 1, end: line.end };
      blocks.push(open);
      continue;
    }
    addLine(blocks, text, line);
  }
  return blocks;
}

function addLine(blocks, text, line) {
  const last = blocks.at(-1);
  if (!text.trim()) {
    if (last && last.kind !== "gap") blocks.push({ kind: "gap", start: line.start, end: line.end });
    return;
  }
  const heading = HEADING.exec(text);
  const bullet = RULE.test(text) ? null : BULLET.exec(text);
  const number = NUMBER.exec(text);
  const quote = QUOTE.exec(text);
  if (RULE.test(text)) blocks.push({ kind: "rule", start: line.start, end: line.end });
  else if (heading) blocks.push({ kind: "heading", level: heading[1].length, start: line.start + heading[0].length, end: line.end });
  else if (bullet || number) {
    const found = bullet ?? number;
    const item = { start: line.start + found[0].length, end: line.end, depth: Math.min(Math.floor(found[1].length / 2), 3) };
    const kind = bullet ? "bullets" : "numbers";
    const list = last?.kind === kind ? last : (last?.kind === "gap" && blocks.at(-2)?.kind === kind ? blocks.at(-2) : null);
    if (list) {
      if (blocks.at(-1) !== list) blocks.pop();
      list.items.push(item);
      list.end = line.end;
    } else blocks.push({ kind, items: [item], first: Number(number?.[2] ?? 1), start: line.start, end: line.end });
  } else if (quote) {
    const piece = { start: line.start + quote[0].length, end: line.end };
    if (last?.kind === "quote") {
      last.items.push(piece);
      last.end = line.end;
    } else blocks.push({ kind: "quote", items: [piece], start: line.start, end: line.end });
  } else if (last?.kind === "text") last.end = line.end;
  else blocks.push({ kind: "text", start: line.start, end: line.end });
}

/** Make the element of one block. */
export function renderBlock(source, block, put, make) {
  const inline = (node, start, end) => renderInline(source, start, end, node, put, make);
  if (block.kind === "code") {
    const code = make("code", {});
    put(code, block.start, Math.max(block.start, block.end));
    return make("figure", { class: "code", data: { language: block.language ?? "" } }, make("pre", { tabindex: "0" }, code));
  }
  if (block.kind === "rule") return make("hr");
  if (block.kind === "heading") {
    // below the page's own headings, whatever level the model chose
    const node = make(`h${Math.min(block.level + 2, 6)}`, {});
    inline(node, block.start, block.end);
    return node;
  }
  if (block.items) {
    const tag = { bullets: "ul", numbers: "ol", quote: "blockquote" }[block.kind];
    const node = make(tag, block.kind === "numbers" && block.first !== 1 ? { start: String(block.first) } : {});
    for (const item of block.items) {
      const child = make(block.kind === "quote" ? "p" : "li", item.depth ? { class: `depth-${item.depth}` } : {});
      inline(child, item.start, item.end);
      node.append(child);
    }
    return node;
  }
  const node = make("p", {});
  inline(node, block.start, block.end);
  return node;
}

// `code`, **bold**, __bold__, *italic*; an underscore inside a word stays one.
const MARKS = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|(\*\*|__)(?=\S)([\s\S]*?\S)\3|(?<![\w*])(\*)(?=[^\s*])([^*\n]*?[^\s*])\5(?![\w*])/g;

function renderInline(source, start, end, parent, put, make) {
  const text = source.slice(start, end);
  let at = 0;
  for (const found of text.matchAll(MARKS)) {
    const mark = found[1] ?? found[3] ?? found[5];
    put(parent, start + at, start + found.index);
    const inner = [start + found.index + mark.length, start + found.index + found[0].length - mark.length];
    const node = make(found[1] ? "code" : found[3] ? "strong" : "em", {});
    if (found[1]) put(node, ...inner);
    else renderInline(source, ...inner, node, put, make);
    parent.append(node);
    at = found.index + found[0].length;
  }
  put(parent, start + at, end);
}
