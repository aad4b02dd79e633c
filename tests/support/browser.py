"""The browser in which pages are tested: the system's Chromium, headless, driven by playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

HOW = "apt-get install -y --no-install-recommends chromium"


@contextmanager
def chromium() -> Iterator[Any]:
    """Start Chromium; the context ends it."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.fail(f"the report's page is tested in Chromium, and there is none: {HOW}")

    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Containers have neither the sandbox that it wants, nor room in /dev/shm.
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """A page that was opened, and what it did wrong: console errors, requests, too wide."""

    def __init__(self, browser: Any, url: str, **settings: Any) -> None:
        settings.setdefault("viewport", {"width": 1280, "height": 900})
        self.context = browser.new_context(**settings)
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.problems.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.problems.append(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)

    @property
    def has_horizontal_scroll(self) -> bool:
        return bool(self.page.evaluate("document.documentElement.scrollWidth > window.innerWidth"))

    def legend(self, chart: str) -> str:
        """Return the legend of a chart: the values under the cursor, or the last ones."""
        return str(self.page.inner_text(f"#chart-{chart} .legend"))

    def point(self, chart: str, share: float) -> None:
        """Move the mouse over a chart, so far from its left edge."""
        box = self.over(chart)
        self.page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)

    def over(self, chart: str) -> dict[str, float]:
        """Return the place of a chart's plotting area, scrolled into view."""
        area = self.page.locator(f"#chart-{chart} .u-over")
        area.scroll_into_view_if_needed()
        box = area.bounding_box()
        assert box is not None
        return dict(box)

    def close(self) -> None:
        self.context.close()
