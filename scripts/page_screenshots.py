"""Take the pictures of the chat page: ``python scripts/page_screenshots.py [MODEL] [--out docs/images]``.

Serves the model (``runs/demo`` by default) and lets a headless Chromium type, wait and point.
"""

from __future__ import annotations

import argparse
import shutil
import threading
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from mtnlg.cli.models import open_model
from mtnlg.config.generation import EngineConfig
from mtnlg.config.serving import ServerConfig
from mtnlg.generation.dialogue_format import choose_format
from mtnlg.serving.backend import Backend
from mtnlg.serving.lifecycle import Server

DESKTOP = {"viewport": {"width": 1080, "height": 640}, "color_scheme": "light", "locale": "en-US"}
PHONE = {"viewport": {"width": 390, "height": 720}, "color_scheme": "dark", "locale": "zh-CN"}
BEGINNINGS = ("The yield expression is used", "春天的早晨，")
COLORS = 160  # of the picture: the page has few, and the file becomes a third


def main() -> None:
    """Serve the model, take both pictures, stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="runs/demo")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    server = serve(arguments.model)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        take(
            browser,
            server,
            DESKTOP,
            "The yield expression is used",
            0.5,
            arguments.out / "page-desktop.png",
        )
        take(browser, server, PHONE, "春天的早晨，", 0.5, arguments.out / "page-phone.png")
        browser.close()
    server.stop()


def serve(model: str) -> Server:
    """A server in a thread, ready."""
    opened, tokenizer = open_model(model, "cpu")
    form = choose_format(tokenizer)
    backend = Backend.of_model(opened, tokenizer, Path(model).resolve().name, form, EngineConfig())
    server = Server(ServerConfig(port=0, log_format="text"), lambda: backend)
    threading.Thread(target=server.run, daemon=True).start()
    while server.state.phase != "ready":
        threading.Event().wait(0.05)
    return server


def take(
    browser: Browser, server: Server, looks: dict[str, Any], beginning: str, share: float, path: Path
) -> None:
    """Let the model go on with ``beginning`` and point at the token that lies ``share`` into its text."""
    page = browser.new_page(**looks, device_scale_factor=1.5)
    page.goto(server.url)
    page.wait_for_selector("[data-ready]")
    sampling(page, {"temperature": 0.4, "max_tokens": 90, "seed": 2})
    page.get_by_role("radio").last.click()
    page.fill("#prompt", beginning)
    page.press("#prompt", "Enter")
    page.wait_for_selector(".assistant:last-child .stats:not(:empty)")
    page.wait_for_selector("#send:not(.busy)")
    tokens = page.locator(".token")
    tokens.nth(int(share * tokens.count())).hover()
    page.screenshot(path=path)
    Image.open(path).convert("RGB").quantize(COLORS).save(path, optimize=True)
    page.close()


def sampling(page: Page, values: dict[str, float]) -> None:
    """Fill in numbers of the settings."""
    page.click("#open-settings")
    for name, value in values.items():
        page.fill(f"#set-{name}", str(value))
    page.keyboard.press("Escape")


if __name__ == "__main__":
    main()
