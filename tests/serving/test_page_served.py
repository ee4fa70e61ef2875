"""The chat page on the real server with a tiny model: what it sends is understood, what comes is shown."""

import pytest
from tests.serving.browser import Visit, chromium
from tests.serving.running import BASE, CHAT, Running


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def running():
    with Running(CHAT) as running:
        yield running


def opened(browser, running):
    return Visit(browser, running.server.url + "/", locale="en-US").open()


@pytest.fixture
def visit(browser, running):
    visit = opened(browser, running)
    yield visit
    visit.close()


def set_numbers(visit, **values):
    visit.page.get_by_role("button", name="Settings").click()
    for name, value in values.items():
        visit.page.locator(f"#set-{name}").fill(str(value))
    visit.page.get_by_role("button", name="Close").click()


def test_a_turn_and_a_reload(visit):
    set_numbers(visit, max_tokens=8, temperature=0)
    answer = visit.ask("hello there")
    assert answer
    stats = visit.page.locator(".stats").inner_text()
    assert "tokens" in stats and "first after" in stats  # what arrives all at once has no rate
    visit.page.reload()
    visit.page.wait_for_selector(".assistant")
    assert visit.answers() == [answer]


def test_every_setting_is_understood_and_the_seed_repeats(visit):
    everything = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "min_p": 0.01, "max_tokens": 12}
    everything |= {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.2, "seed": 7}
    set_numbers(visit, **everything)
    first = visit.ask("hello there")
    visit.page.get_by_role("button", name="Answer again").click()
    visit.page.get_by_role("group", name="Version 2 of 2").wait_for()
    visit.ended()
    assert visit.answers() == [first]
    assert visit.page.locator(".notice").count() == 0


def test_the_probabilities_are_the_models(visit):
    set_numbers(visit, max_tokens=4, temperature=0)
    visit.ask("hello there")
    visit.page.locator(".token").first.hover()
    rows = visit.page.locator("#alternatives .options >> nth=0").locator(".option").all_inner_texts()
    shares = [float(row.split("\n")[1].strip("<%")) for row in rows]
    assert len(rows) == 5
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 101
    first = visit.page.locator("#alternatives .option").first.get_attribute("class")
    assert "chosen" in first  # greedy takes the likeliest


def test_a_setting_beyond_the_model_is_explained(visit):
    set_numbers(visit, max_tokens=50000)
    visit.say("hello")
    notice = visit.page.get_by_role("alert")
    notice.get_by_text("maximum context length is 512 tokens").wait_for()
    assert visit.answers() == []


def test_a_base_model_is_asked_to_continue_and_may_chat(browser):
    with Running(BASE) as running:
        visit = opened(browser, running)
        assert visit.page.get_by_role("radio", name="Continue text").get_attribute("aria-checked") == "true"
        set_numbers(visit, max_tokens=8)
        visit.ask("hello")
        assert visit.page.locator(".notice").count() == 0
        assert visit.page.locator(".stats").inner_text()
        visit.page.get_by_role("radio", name="Chat").click()
        assert visit.page.get_by_text("was never trained to chat").is_visible()
        visit.ask("hello")
        assert visit.page.locator(".notice").count() == 0
        visit.close()


def test_the_page_needs_no_key_and_the_api_does(browser):
    with Running(CHAT, api_keys=("secret-key",)) as running:
        visit = opened(browser, running)
        visit.page.get_by_role("button", name="Enter a key").click()
        visit.page.get_by_label("API key").fill("secret-key")
        visit.page.get_by_role("button", name="Close").click()
        visit.page.locator(".notice").wait_for(state="detached")
        set_numbers(visit, max_tokens=4)
        visit.ask("hello")
        assert visit.page.locator(".notice").count() == 0
        visit.close()


def test_an_answer_cut_off_by_its_length_goes_on(visit):
    set_numbers(visit, max_tokens=6, temperature=0)
    first = visit.ask("hello there")
    visit.page.get_by_role("button", name="Go on").click()
    visit.page.wait_for_function(
        "(text) => document.querySelector('.assistant .body').innerText.length > text.length", arg=first
    )
    visit.ended()
    assert visit.answers()[0].startswith(first)
    assert visit.page.locator(".stats").inner_text().startswith("12 tokens")
    assert visit.page.locator(".notice").count() == 0
