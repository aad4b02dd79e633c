"""report-desktop.png and report-phone.png: the report's page of a made-up run. Needs Chromium.

PYTHONPATH=. python docs/images/report_page.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from miles.report.report import write_report
from tests.support.browser import Watched, chromium
from tests.support.report_runs import write_full_run

FOLDER = Path(__file__).parent


def main() -> None:
    """Draw the pictures."""
    with tempfile.TemporaryDirectory() as name, chromium() as browser:
        page = write_report(str(write_full_run(Path(name) / "chat-4b", 600)))[0]

        desktop = Watched(browser, f"file://{page}", viewport={"width": 1180, "height": 860})
        desktop.page.fill("#smoothing", "0.85")
        desktop.page.evaluate("window.scrollTo(0, 0)")
        desktop.point("loss", 0.62)
        desktop.page.screenshot(path=FOLDER / "report-desktop.png")

        size = {"width": 390, "height": 844}
        phone = Watched(browser, f"file://{page}", viewport=size, color_scheme="dark")
        phone.page.screenshot(path=FOLDER / "report-phone.png")


if __name__ == "__main__":
    main()
