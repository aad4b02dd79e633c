"""A report whose pictures are not drawn: that takes a second for each page."""

from __future__ import annotations

import pytest

from miles.report import html_page, report


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave matplotlib out, for a test of what else is on the page."""
    for module, chart in ((html_page, "run_chart"), (report, "loss_chart")):
        monkeypatch.setattr(module, chart, lambda metrics: None)
        monkeypatch.setattr(module, "to_png", lambda figure: b"\x89PNG")
