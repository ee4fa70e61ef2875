"""A real Chromium for the tests of the page, and what each test looks at in it."""

import contextlib

import pytest
from tests.serving.pretend import CHROMIUM, CHROMIUM_FLAGS, SECONDS

CONTROLS = "button, a[href], input, select, textarea, [tabindex]"


@contextlib.contextmanager
def chromium():
    """A headless browser; the test is skipped, and says so, where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the page is not tested (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


class Visit:
    """One visitor's page, with all that went wrong on it and all that it asked for."""

    def __init__(self, browser, url, **options):
        self.url = url
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
        self.context.set_default_timeout(SECONDS * 1000)
        self.page = self.context.new_page()
        self.faults, self.asked = [], []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", self.note)
        self.page.on("request", lambda request: self.asked.append(request.url))

    def note(self, message):
        # a status that is not 2xx is the server's, and what some tests ask for
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.faults.append(message.text)

    def open(self):
        self.page.goto(self.url)
        self.page.wait_for_selector("[data-ready]")
        return self

    def say(self, text):
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def ended(self):
        """Wait until the answer is complete."""
        self.page.wait_for_selector("#send:not(.busy)")

    def ask(self, text):
        self.say(text)
        self.ended()
        return self.answers()[-1]

    def texts(self, role):
        return [body.inner_text().strip() for body in self.page.query_selector_all(f".{role} .body")]

    def answers(self):
        return self.texts("assistant")

    def expect_answer(self, text):
        """Wait until the first answer is exactly this text."""
        from playwright.sync_api import expect

        expect(self.page.locator(".assistant .body").first).to_have_text(text, timeout=SECONDS * 1000)

    def close(self):
        self.context.close()
        origin = self.url.rstrip("/")
        outside = [url for url in self.asked if not url.startswith((origin, "blob:" + origin))]
        assert outside == [], "a request left the origin"
        assert self.faults == []
