"""The chat page for everyone: languages, themes, phones, keyboards, screen readers; and safe for all."""

import re

import pytest
from tests.serving.browser import CONTROLS, Visit, chromium
from tests.serving.pretend import Pretend, Served

from mtnlg.serving.page_files import page_files


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def server():
    pretend = Pretend()
    with Served(pretend.app) as running:
        pretend.url = running.url
        yield pretend


@pytest.fixture
def open_page(browser, server):
    visits = []

    def make(**options):
        visits.append(Visit(browser, server.url, **{"locale": "en-US", **options}).open())
        return visits[-1]

    server.answers, server.gate, server.requests = ["Hello there."], None, []
    yield make
    for visit in visits:
        visit.close()


def background(visit):
    return visit.page.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize(
    "locale, title",
    [("en-US", "What shall we talk about?"), ("zh-CN", "想聊点什么？"), ("fr-FR", "What shall")],
)
def test_the_language_is_the_browsers(open_page, locale, title):
    visit = open_page(locale=locale)
    assert visit.page.locator("h2").inner_text().startswith(title)
    assert visit.page.locator("html").get_attribute("lang") == ("zh-CN" if locale == "zh-CN" else "en")


def test_the_language_can_be_switched_and_is_kept(open_page):
    visit = open_page()
    visit.page.get_by_role("button", name="用中文显示").click()
    assert visit.page.locator("h2").inner_text() == "想聊点什么？"
    visit.page.reload()
    assert visit.page.get_by_role("button", name="新对话").is_visible()
    assert visit.page.locator("#prompt").get_attribute("placeholder") == "说点什么……"


def test_no_word_is_missing_in_either_language():
    words = page_files()["/page/words.js"].content.decode()
    pairs = re.findall(r"^  (\w+): \[\s*\"(.*?)\",\s*\"(.*?)\",?\s*\]", words, re.MULTILINE | re.DOTALL)
    assert len(pairs) > 100
    for name, english, chinese in pairs:
        assert english and chinese, name
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", chinese)), name
    used = "".join(file.content.decode() for path, file in page_files().items() if path != "/page/words.js")
    for name in re.findall(r"\bsay\(\"(\w+)\"|data-(?:words|label|placeholder)=\"(\w+)\"", used):
        assert any(word in name for word, *_ in pairs), name


def test_the_theme_is_the_systems_and_can_be_switched(open_page):
    light, dark = open_page(color_scheme="light"), open_page(color_scheme="dark")
    paper, night = background(light), background(dark)
    assert paper != night
    for expected, name in [(paper, "Theme: light"), (night, "Theme: dark")]:
        light.page.locator("#theme").click()
        assert light.page.get_by_role("button", name=name).is_visible()
        assert background(light) == expected
    light.page.reload()
    assert background(light) == night
    light.page.locator("#theme").click()
    assert background(light) == paper


LONG = "# Words\n\n" + "unbroken" * 40 + "\n\n```\n" + "x = 1; " * 60 + "\n```\n\n很长的一行" * 30


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_scrolls_only_downwards(open_page, server, width):
    visit = open_page(viewport={"width": width, "height": 700}, has_touch=True, is_mobile=True)
    server.answers = [LONG]
    visit.ask("long " * 30)
    assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert visit.page.evaluate("document.querySelector('#scroll').scrollWidth <= innerWidth")
    for name in ("Send", "Settings", "Show conversations"):
        box = visit.page.get_by_role("button", name=name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        assert min(box["width"], box["height"]) >= 38  # a finger's size
    visit.page.get_by_role("button", name="Settings").click()
    assert visit.page.evaluate("document.querySelector('#settings').scrollWidth <= innerWidth")


def test_on_a_phone_the_list_is_a_drawer(open_page):
    visit = open_page(viewport={"width": 390, "height": 700})
    visit.ask("hello")
    assert not visit.page.locator("#new-chat").is_visible()
    visit.page.get_by_role("button", name="Show conversations").click()
    visit.page.locator(".pick").click()
    visit.page.locator("#new-chat").wait_for(state="hidden")
    visit.page.get_by_role("button", name="Show conversations").click()
    visit.page.keyboard.press("Escape")
    visit.page.locator("#new-chat").wait_for(state="hidden")
    focused = visit.page.evaluate("document.activeElement.id")
    assert focused == "open-sidebar"


def test_a_tap_shows_the_alternatives(open_page):
    visit = open_page(viewport={"width": 390, "height": 700}, has_touch=True, is_mobile=True)
    visit.ask("hello")
    visit.page.locator(".token").first.tap()
    box = visit.page.locator("#alternatives").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390


def focus(visit):
    """Name and ring of what has the focus."""
    return visit.page.evaluate(
        """() => {
            const node = document.activeElement;
            const style = getComputedStyle(node);
            const frame = getComputedStyle(node.closest(".composer") ?? node);
            const isSeen = style.outlineStyle !== "none" || frame.borderColor !== "";
            return [node.id || node.getAttribute("aria-label") || node.className || node.tagName, isSeen];
        }"""
    )


def test_everything_is_reached_and_done_by_keyboard(open_page, server):
    visit = open_page()
    press = visit.page.keyboard.press
    assert focus(visit)[0] == "prompt"
    visit.page.keyboard.type("hello")
    press("Enter")
    visit.ended()
    visit.expect_answer("Hello there.")
    visit.page.locator("body").evaluate("() => document.activeElement.blur()")
    seen = []
    for _ in range(40):  # all the way round
        press("Tab")
        name, is_seen = focus(visit)
        assert is_seen, name
        seen.append(name)
    seen = seen[seen.index("skip") :]
    for name in ("skip", "new-chat", "search", "pick", "theme", "language", "help", "mode-chat", "model"):
        assert name in seen, name
    assert seen.index("new-chat") < seen.index("model") < seen.index("prompt") < seen.index("send")
    press("Alt+KeyS")
    assert visit.page.get_by_role("dialog", name="Settings").is_visible()
    press("Escape")
    press("Alt+Slash")
    assert visit.page.get_by_role("dialog", name="Keyboard shortcuts").is_visible()
    press("Escape")
    press("Alt+KeyJ")
    assert focus(visit)[0] == "prompt"
    press("ArrowUp")
    visit.page.keyboard.type(" again")
    press("Enter")
    visit.page.get_by_text("2/2").wait_for()
    visit.ended()
    assert visit.texts("user") == ["hello again"]
    press("Alt+KeyL")
    assert focus(visit)[0] == "pick"
    press("Alt+KeyN")
    assert (visit.texts("user"), focus(visit)[0]) == ([], "prompt")


def test_enter_that_chooses_characters_does_not_send(open_page, server):
    visit = open_page(locale="zh-CN")
    visit.page.fill("#prompt", "ni")
    visit.page.locator("#prompt").evaluate(
        """node => {
            const key = { key: "Enter", isComposing: true, bubbles: true, cancelable: true };
            node.dispatchEvent(new KeyboardEvent("keydown", key));
        }"""
    )
    visit.page.keyboard.press("Shift+Enter")
    assert visit.page.locator("#prompt").input_value() == "ni\n"
    assert server.requests == []


def test_arrow_keys_walk_through_the_tokens_and_are_spoken(open_page, server):
    visit = open_page()
    server.answers = ["Red blue"]
    visit.ask("colours")
    visit.page.locator(".assistant .body").focus()
    visit.page.keyboard.press("ArrowRight")
    visit.page.keyboard.press("ArrowRight")
    assert visit.page.locator(".token.marked").inner_text().strip() == "blue"
    assert visit.page.locator("#announce").inner_text().startswith("␣blue 60%; ␣blue~ 20%")
    visit.page.keyboard.press("Home")
    assert visit.page.locator(".token.marked").inner_text() == "Red"
    visit.page.keyboard.press("Escape")
    assert visit.page.locator("#alternatives").is_hidden()


def test_a_screen_reader_hears_sentences_and_not_tokens(open_page, server):
    visit = open_page()
    visit.page.evaluate(
        """() => {
            window.heard = [];
            const hear = () => heard.push(announce.textContent);
            new MutationObserver(hear).observe(announce, { childList: true });
        }"""
    )
    server.answers = ["One is first. Two is second. Three comes last."]
    visit.ask("count")
    heard = [text.strip() for text in visit.page.evaluate("heard")]
    assert heard[0] == "The model is writing"
    assert heard[-1].endswith("Answer finished.")
    assert len(heard) < 6
    assert " ".join(heard).replace("  ", " ").count("Three comes last.") == 1
    assert visit.page.get_by_role("log").get_attribute("aria-live") == "off"


def nameless(visit):
    """Controls that a screen reader could only call 'button'."""
    session = visit.context.new_cdp_session(visit.page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    roles = {
        "button",
        "link",
        "textbox",
        "searchbox",
        "combobox",
        "slider",
        "spinbutton",
        "checkbox",
        "switch",
    }
    roles |= {"radio", "dialog", "radiogroup", "navigation", "image"}
    found = [node for node in nodes if not node.get("ignored") and node["role"]["value"] in roles]
    assert len(found) > 10
    return [node["role"]["value"] for node in found if not node.get("name", {}).get("value")]


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_every_control_has_a_name(open_page, locale):
    visit = open_page(locale=locale)
    assert nameless(visit) == []
    visit.ask("hello")
    assert nameless(visit) == []
    visit.page.keyboard.press("Alt+KeyS")
    assert nameless(visit) == []
    ids = visit.page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(ids) == len(set(ids))


CONTRAST = """() => {
    const shade = (text) => {
        const at = new OffscreenCanvas(1, 1).getContext("2d");
        at.fillStyle = text;
        at.fillRect(0, 0, 1, 1);
        return at.getImageData(0, 0, 1, 1).data;
    };
    const light = ([red, green, blue]) => {
        const [r, g, b] = [red, green, blue].map((value) => {
            const part = value / 255;
            return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (node) => {
        for (let at = node; at; at = at.parentElement) {
            const found = shade(getComputedStyle(at).backgroundColor);
            if (found[3] === 255) return found;
        }
        return [255, 255, 255];
    };
    const poor = [];
    for (const node of document.querySelectorAll("body *")) {
        const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
        const isSeen = own && node.checkVisibility({ opacityProperty: true });
        if (!isSeen || node.closest(".hidden, .skip, noscript, option, button:disabled")) continue;
        const [one, other] = [light(shade(getComputedStyle(node).color)), light(ground(node))];
        const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
        if (ratio < 4.5) poor.push(`${node.className || node.tagName}: ${ratio.toFixed(2)}`);
    }
    return poor;
}"""


def test_headings_lead_through_the_page_on_a_phone_too(open_page, server):
    visit = open_page(viewport={"width": 390, "height": 700})
    server.answers = ["#### Deep\n\ntext"]
    visit.ask("hello")
    levels = visit.page.evaluate(
        "[...document.querySelectorAll('main :is(h1, h2, h3, h4, h5, h6)')]"
        ".filter((one) => one.checkVisibility()).map((one) => [one.tagName, one.textContent])"
    )
    assert levels == [["H1", "hello"], ["H2", "You"], ["H2", "pretend"], ["H3", "Deep"]]
    assert visit.page.locator("#language").get_attribute("aria-label").startswith("中")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(open_page, server, scheme):
    visit = open_page(color_scheme=scheme)
    assert visit.page.evaluate(CONTRAST) == []
    server.answers = ["Some **bold** `code`\n\n> quoted\n\n```python\nx\n```"]
    visit.ask("hello")
    visit.page.locator(".token").first.hover()
    assert visit.page.evaluate(CONTRAST) == []
    visit.page.keyboard.press("Alt+KeyS")
    assert visit.page.evaluate(CONTRAST) == []


EVIL = """<img src=x onerror="window.hurt = 1"> <script>window.hurt = 2</script>
[click](javascript:window.hurt=3) ![picture](https://example.com/x.png)

- <b>no</b>

```html
</code></pre><script>window.hurt = 4</script>
```"""


def test_what_a_model_writes_is_only_ever_text(open_page, server):
    visit = open_page()
    server.answers = [EVIL]
    visit.ask("<i>hello</i>")
    inside = visit.page.locator("#messages").locator("img, script, b, i, iframe")
    assert inside.count() == 0
    [link] = visit.page.locator("#messages a").all()  # the picture, which is not fetched by itself
    assert link.get_attribute("href") == "https://example.com/x.png"
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    assert visit.page.evaluate("window.hurt") is None
    assert '<img src=x onerror="window.hurt = 1">' in visit.answers()[0]
    assert visit.texts("user") == ["<i>hello</i>"]
    refused = visit.page.evaluate(
        "() => { try { document.body.innerHTML = '<p>'; return false; } catch (error) { return true; } }"
    )
    assert refused  # by the policy, whoever would write that
    visit.faults.clear()


CODE = '<figure class="code" data-language="py"><pre tabindex="0"><code>{}</code></pre></figure>'
LINK = '<a href="{0}" title="{0}" target="_blank" rel="noopener noreferrer nofollow">{1}</a>'
MARKDOWN = [
    ("**bold** and *soft* `code`", "<p><strong>bold</strong> and <em>soft</em> <code>code</code></p>"),
    ("snake_case_name 2*3*4", "<p>snake_case_name 2*3*4</p>"),
    ("- one\n- **two**\n\n- three", "<ul><li>one</li><li><strong>two</strong></li><li>three</li></ul>"),
    ("2. two\n3. three", '<ol start="2"><li>two</li><li>three</li></ol>'),
    ("# Title\ntext", "<h3>Title</h3><p>text</p>"),
    ("> said\n> more", "<blockquote><p>said</p><p>more</p></blockquote>"),
    ("a\n\n---\nb", "<p>a</p><hr><p>b</p>"),
    ("1、苹果\n2、梨", "<ol><li>苹果</li><li>梨</li></ol>"),
    ("**未完", "<p>**未完</p>"),
    (
        "```py\na **b**",
        '<figure class="code" data-language="py"><pre tabindex="0"><code>a **b**</code></pre></figure>',
    ),
    ("$1.50 每斤", "<p>$1.50 每斤</p>"),
    ("3.14 is pi", "<p>3.14 is pi</p>"),
    ("~~a~~ _b_ \\*c\\* d_e_f", "<p><s>a</s> <em>b</em> *c* d_e_f</p>"),
    ("### a\n# b\n### c", "<h3>a</h3><h3>b</h3><h4>c</h4>"),
    (
        "1. a\n   - b\n     c\n2. d\n- [x] e",
        '<ol><li>a<ul><li>b\nc</li></ul></li><li>d</li></ol><ul><li class="task">☑ e</li></ul>',
    ),
    (
        "t\n|a|b|\n|-|-:|\n|`x|y`|1 \\| 2|\n|only|\n\nu",
        '<p>t</p><div class="table" tabindex="0"><table><thead><tr><th scope="col">a</th>'
        '<th class="right" scope="col">b</th></tr></thead><tbody><tr><td><code>x|y</code></td>'
        '<td class="right">1 | 2</td></tr><tr><td>only</td><td class="right"></td></tr></tbody></table>'
        "</div><p>u</p>",
    ),
    ("a|b\n--\nc", "<p>a|b\n--\nc</p>"),
    (
        "   ```\n   a\n     b",
        '<figure class="code" data-language=""><pre tabindex="0"><code>a\n  b</code></pre></figure>',
    ),
    ("[a](javascript:1) [b](data:text/html,x)", "<p>[a](javascript:1) [b](data:text/html,x)</p>"),
    ("[**a**](https://b.c/d_(e))", f"<p>{LINK.format('https://b.c/d_(e)', '<strong>a</strong>')}</p>"),
    ("见https://b.c/d_e_f。", f"<p>见{LINK.format('https://b.c/d_e_f', 'https://b.c/d_e_f')}。</p>"),
    ("(https://b.c/?a=1)", f"<p>({LINK.format('https://b.c/?a=1', 'https://b.c/?a=1')})</p>"),
    ("[https://b.c](https://evil.d)", "<p><span>[https://b.c](https://evil.d)</span></p>"),
]


def test_markdown(open_page):
    visit = open_page()
    rendered = visit.page.evaluate(
        """async (sources) => {
            const { blocksOf, renderBlock } = await import("/page/markdown.js");
            const { make } = await import("/page/dom.js");
            return sources.map((source) => {
                const put = (parent, start, end) => end > start && parent.append(source.slice(start, end));
                const blocks = blocksOf(source).filter((block) => block.kind !== "gap");
                return blocks.map((block) => renderBlock(source, block, put, make).outerHTML).join("");
            });
        }""",
        [source for source, _ in MARKDOWN],
    )
    for (source, expected), found in zip(MARKDOWN, rendered, strict=True):
        assert found == expected, source


def test_a_hostile_text_is_drawn_in_time(open_page):
    visit = open_page()
    seconds = visit.page.evaluate(
        """async () => {
            const { blocksOf, renderBlock } = await import("/page/markdown.js");
            const { make } = await import("/page/dom.js");
            const put = (parent, start, end) => parent.append(String(end - start));
            const began = performance.now();
            const pieces = ["[", "**a ", "https://", "[a](https://b(", "`", "_a", "|", "- a\\n", "\\*"];
            for (const piece of pieces) {
                const source = piece.repeat(4000);
                for (const block of blocksOf(source)) renderBlock(source, block, put, make);
            }
            return (performance.now() - began) / 1000;
        }"""
    )
    assert seconds < 30  # a quarter of a second on a quiet machine


def test_events_are_read_whatever_the_pieces_of_the_network(open_page):
    visit = open_page()
    found = visit.page.evaluate(
        """async () => {
            const { serverEvents, retryAfterSeconds } = await import("/page/api.js");
            const bytes = new TextEncoder().encode(
                ': hello\\r\\ndata: {"a": "你好"}\\r\\n\\r\\ndata: 2\\n\\nevent: x\\rdata:3\\r\\r');
            const all = [];
            for (const size of [1, 2, 3, 7, 100]) {
                const stream = new ReadableStream({
                    start(controller) {
                        for (let at = 0; at < bytes.length; at += size) {
                            controller.enqueue(bytes.slice(at, at + size));
                        }
                        controller.close();
                    },
                });
                const events = [];
                for await (const data of serverEvents(stream)) events.push(data);
                all.push(events.join("|"));
            }
            const now = Date.parse("Wed, 21 Oct 2026 07:28:00 GMT");
            const waits = ["7", "0.5", "Wed, 21 Oct 2026 07:28:30 GMT", "soon", null];
            return [all, waits.map((value) => retryAfterSeconds(value, now))];
        }"""
    )
    assert found == [['{"a": "你好"}|2|3'] * 5, [7, 1, 30, None, None]]


def test_the_controls_of_the_page_are_known(open_page):
    """A control that is new must pass through the checks above: none hides in a frame or a shadow."""
    visit = open_page()
    assert visit.page.locator(CONTROLS).count() > 15
    assert visit.page.evaluate("[...document.querySelectorAll('*')].every((node) => !node.shadowRoot)")


def test_files_are_sent_with_their_headers(server):
    import httpx

    page = httpx.get(server.url)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert httpx.get(server.url, headers={"If-None-Match": page.headers["etag"]}).status_code == 304
    names = set(re.findall(r'(?:href|src)="(page/[^"]+)"', page.text))
    assert {"page/app.js", "page/style.css", "page/icon.svg"} <= names
    for name in names:
        found = httpx.get(server.url + name)
        assert (found.status_code, found.headers["x-content-type-options"]) == (200, "nosniff"), name
    for name in ("page/../page_files.py", "page/%2e%2e/page_files.py", "page/nothing.js", "page/"):
        assert httpx.get(server.url + name).status_code == 404


def test_the_files_are_part_of_the_package():
    import tomllib
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    with (root / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["mtnlg"]
    assert "serving/page/*" in patterns
    for path, file in page_files().items():
        assert file.content, path
        assert b"http://" not in file.content.replace(b"http://www.w3.org/2000/svg", b""), path
        assert b"https://" not in file.content, path
        assert b"innerHTML" not in file.content, path
