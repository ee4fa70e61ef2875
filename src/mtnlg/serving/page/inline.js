// Marks inside a line: `code`, links, **bold**, *italic*, ~~struck~~. Text keeps its place in the source.

const ADDRESS = String.raw`(?:https?:\/\/|mailto:)[^\s<>()\u2e80-\u9fff\uff00-\uffef]+(?:\([^\s<>()]*\)[^\s<>()\u2e80-\u9fff\uff00-\uffef]*)*`;
// Inside a word an underscore or a star stays one; a picture becomes a link, nothing is fetched by itself.
const MARKS = new RegExp(
  [
    "(?<code>`+)(?:[^`]|[^`][\\s\\S]*?[^`])\\k<code>(?!`)",
    String.raw`(?<link>!?\[(?<label>[^\]\n]{1,500})\]\(\s*<?(?<to>${ADDRESS})>?(?:\s+"[^"\n]*")?\s*\))`,
    String.raw`<(?<auto>${ADDRESS})>`,
    String.raw`(?<![\w/])(?<bare>https?:\/\/[^\s<>()"\u2e80-\u9fff\uff00-\uffef\x60]*(?:\([^\s<>()]*\))?[^\s<>()"\u2e80-\u9fff\uff00-\uffef\x60.,;:!?'*_~]\/?)`,
    String.raw`(?<bold>\*\*|__)(?=\S)(?:[\s\S]{0,2000}?\S)\k<bold>`,
    String.raw`(?<struck>~~)(?=\S)(?:[^\n]*?\S)~~`,
    String.raw`(?<![\w*])(?<star>\*)(?=[^\s*])(?:[^*\n]*?[^\s*\\])\*(?![\w*])`,
    String.raw`(?<![\w_])(?<under>_)(?=[^\s_])(?:[^_\n]*?[^\s_])_(?![\w_])`,
    String.raw`\\(?<escaped>[*_~|#>\x60])`,
  ].join("|"),
  "g",
);
const SCHEMES = new Set(["http:", "https:", "mailto:"]);

/** Put source[start:end] into `parent`, with its marks as elements. */
export function renderInline(source, start, end, parent, put, make) {
  const text = source.slice(start, end);
  let at = 0;
  for (;;) {
    MARKS.lastIndex = at; // shared with the calls inside: making another takes longer than a line does
    const found = MARKS.exec(text);
    if (!found) break;
    const from = start + found.index;
    put(parent, start + at, from);
    at = found.index + found[0].length;
    if (found.groups.escaped) {
      put(parent, from + 1, from + 2); // the backslash is not shown
      continue;
    }
    const fill = (node, first, last, isPlain) => (isPlain ? put(node, first, last) : renderInline(source, first, last, node, put, make));
    parent.append(elementOf(found, from, make, fill));
  }
  put(parent, start + at, end);
}

function elementOf(found, from, make, fill) {
  const { code, link, label, to, auto, bare, bold, struck, star, under } = found.groups;
  const until = from + found[0].length;
  if (link || auto || bare) {
    const node = linkTo(to ?? auto ?? bare, make, label);
    const first = from + (auto ? 1 : link ? found[0].indexOf("[") + 1 : 0);
    if (node.tagName === "A") fill(node, first, first + (label ?? auto ?? bare).length, !link || label.includes(":"));
    else fill(node, from, until, true);
    return node;
  }
  const mark = code ?? bold ?? struck ?? star ?? under;
  const node = make(code ? "code" : bold ? "strong" : struck ? "s" : "em", {});
  fill(node, from + mark.length, until - mark.length, Boolean(code));
  return node;
}

/**
 * A link that shows where it goes when pointed at, opens beside the page and tells the other nothing; a
 * plain span where the address is none, or where its label names another one.
 */
function linkTo(address, make, label = "") {
  const found = addressOf(address);
  const claimed = /^(?:https?:\/\/|www\.)/i.test(label.trim()) && addressOf(label.trim().replace(/^www\./i, "https:" + "//www."));
  const isHonest = !claimed || claimed.host === found?.host;
  if (!found || !SCHEMES.has(found.protocol) || !isHonest) return make("span", {});
  return make("a", { href: found.href, title: found.href, target: "_blank", rel: "noopener noreferrer nofollow" });
}

function addressOf(text) {
  try {
    return new URL(text);
  } catch {
    return null;
  }
}
