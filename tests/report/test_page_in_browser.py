"""The report's page in a real browser: charts, themes, widths, accessibility, no network, live."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miles.common import run_folder
from miles.report.live import LiveServer
from miles.report.report import write_report
from tests.support.browser import Watched, chromium
from tests.support.report_runs import line_of, lines_of, write_full_run

pytestmark = pytest.mark.heavy

PHONE = {"viewport": {"width": 390, "height": 844}}
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
NUM_STEPS = 200


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def page_url(tmp_path_factory: pytest.TempPathFactory, chatml_tokenizer_folder: Path) -> str:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("run") / "chat-4b"
    tokenizer = AutoTokenizer.from_pretrained(chatml_tokenizer_folder)
    written = write_report(str(write_full_run(folder, NUM_STEPS, tokenizer)))
    return f"file://{written[0]}"


@pytest.fixture
def opened(browser: Any, page_url: str) -> Iterator[Watched]:
    watched = Watched(browser, page_url)
    yield watched
    watched.close()


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_is_readable(browser: Any, page_url: str, size: dict[str, Any], theme: str) -> None:
    """At both widths, in both themes: no fault that axe knows, no scroll sideways, no network."""
    from axe_playwright_python.sync_playwright import Axe

    watched = Watched(browser, page_url, color_scheme=theme, **size)
    page = watched.page
    assert page.evaluate("document.documentElement.dataset.ready") == "true"
    assert not watched.has_horizontal_scroll
    for summary in page.query_selector_all("details:not([open]) > summary"):
        summary.click()
    assert not watched.has_horizontal_scroll

    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(246, 247, 249)", "dark": "rgb(16, 20, 24)"}[theme]
    assert watched.problems == []
    assert watched.requests == [page_url]
    watched.close()


def test_a_switch_changes_the_theme(opened: Watched) -> None:
    before = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    opened.page.click("#theme")
    after = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert before != after
    assert opened.page.inner_text("#theme") == "Light theme"


def test_hover_shows_all_values_of_a_step(opened: Watched) -> None:
    assert opened.legend("loss").startswith(f"last step {NUM_STEPS - 1}")
    opened.point("loss", 0.5)
    shown = opened.legend("loss").split()
    step = int(shown[1])
    assert abs(step - NUM_STEPS / 2) < 3
    line = lines_of(NUM_STEPS)[step]
    assert f"{line['sft/loss']:.5g}" in shown
    assert "evaluation" in shown
    assert f"step {step}" in opened.legend("learning-rate"), "all charts show the same step"

    # The stall: its span, how long, and what for.
    opened.point("queue-depth", 0.305)
    assert "steps 60 to 63: waited " in opened.page.inner_text("#chart-queue-depth .note")
    assert "encoding" in opened.page.inner_text("#chart-queue-depth .note")
    opened.page.focus("#chart-loss .plot")
    opened.page.keyboard.press("End")
    opened.page.keyboard.press("ArrowLeft")
    assert f"step {NUM_STEPS - 2}" in opened.legend("loss"), "keys do what the mouse does"


def test_drag_zooms_and_a_button_resets(opened: Watched) -> None:
    assert opened.page.is_disabled("#reset-zoom")
    box = opened.over("loss")
    opened.point("loss", 0.25)
    opened.page.mouse.down()
    opened.page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 40, steps=4)
    opened.page.mouse.up()
    assert opened.page.is_enabled("#reset-zoom")

    opened.point("gradient-norm", 0.01)
    begin = int(opened.legend("gradient-norm").split()[1])
    assert abs(begin - NUM_STEPS / 4) < 4, "every chart is zoomed"
    opened.page.click("#reset-zoom")
    opened.point("gradient-norm", 0.01)
    assert int(opened.legend("gradient-norm").split()[1]) < 4


def test_axes_smoothing_and_curves(opened: Watched) -> None:
    page = opened.page
    page.select_option("#x-axis", "tokens")
    assert f"step {NUM_STEPS - 1} · 3.6M tokens" in opened.legend("loss")
    page.select_option("#x-axis", "time")
    assert f"step {NUM_STEPS - 1} · 1" in opened.legend("loss")

    page.fill("#smoothing", "0.9")
    assert page.inner_text("#smoothing-shown") == "0.90"
    assert "(" in opened.legend("loss"), "the smoothed value, and the one that it is of"
    assert "(" not in opened.legend("learning-rate"), "what is set is not smoothed"
    before = page.locator("#chart-loss canvas").screenshot()
    page.check("#log")
    assert page.locator("#chart-loss canvas").screenshot() != before

    page.click("#chart-loss .legend button >> nth=1")
    assert page.get_attribute("#chart-loss .legend button >> nth=1", "aria-pressed") == "false"
    assert opened.problems == []


def test_settings_are_found(opened: Watched) -> None:
    page = opened.page
    first = page.inner_text("#settings tbody tr >> nth=0")
    assert first.startswith("--")
    page.fill("#settings-filter", "save-int")
    shown = page.locator("#settings tbody tr:visible").all_inner_texts()
    assert [row.split()[:2] for row in shown] == [["--save-interval", "100"]]


def test_pictures_stand_in_where_no_script_runs(browser: Any, page_url: str) -> None:
    watched = Watched(browser, page_url, java_script_enabled=False)
    pictures = watched.page.locator("noscript img, img")
    assert pictures.count() == 1
    box = pictures.bounding_box()
    assert box is not None
    assert box["height"] > 400
    assert not watched.page.is_visible("#x-axis")
    assert watched.page.is_visible("#settings tbody tr >> nth=0")
    watched.close()


def test_a_live_page_follows_the_run(browser: Any, tmp_path: Path) -> None:
    """New points arrive without a reload, also when the run goes back to its checkpoint."""
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)
    folder = write_full_run(tmp_path / "run", 40)
    metrics = folder / run_folder.METRICS
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:20]))

    with LiveServer(str(folder)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        watched = Watched(browser, server.url)
        page = watched.page
        assert watched.legend("loss").startswith("last step 19")
        page.select_option("#x-axis", "tokens")
        page.evaluate("window.isTheSame = true")

        with metrics.open("a") as file:
            file.write("".join(lines[20:]))
        expect(page.locator("#chart-loss .at")).to_contain_text("step 39")
        assert page.input_value("#x-axis") == "tokens"
        assert "40 steps" in page.inner_text("#part-summary")

        fresh = line_of(30, 40, random.Random(1))
        metrics.with_suffix(".new").write_text("".join([*lines[:30], json.dumps(fresh), "\n"]))
        metrics.with_suffix(".new").replace(metrics)
        expect(page.locator("#chart-loss .at")).to_contain_text("step 30")
        assert page.evaluate("window.isTheSame"), "it was never loaded again"
        assert {request.rsplit("/", 1)[0] for request in watched.requests} == {server.url[:-1]}
        assert watched.problems == []

        server.shutdown()
        thread.join()
    expect(page.locator("#live")).to_have_text("miles report --live has ended")
    watched.close()
