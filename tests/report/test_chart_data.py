"""What the page's charts are drawn from: columns, stalls, thinning, marks; settings and facts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from miles.common import run_folder
from miles.report.chart_data import page_data
from miles.report.columns import Columns
from miles.report.html_page import as_script_data, policy
from miles.report.report import write_report
from miles.report.run_settings import setting_lines
from miles.report.stalls import find_stalls
from miles.report.thinning import MAX_POINTS, kept_steps
from tests.support.metrics_lines import EVALUATED_RUN, PLAIN_RUN, metrics_line, write_lines
from tests.support.report_runs import lines_of, write_full_run


def test_columns_have_gaps_where_lines_have_no_number() -> None:
    columns = Columns(EVALUATED_RUN)
    assert math.isnan(columns["sft/loss"][0])
    assert columns["sft/loss"][1:].tolist() == [1.75, 1.5, 1.25]
    assert np.isnan(columns["eval/loss"]).tolist() == [True, False, True, False]
    assert columns["no/such/key"].shape == (4,)
    assert columns.seconds.tolist() == [2, 5, 9, 14]


def test_charts_share_their_steps() -> None:
    data = page_data(Columns(EVALUATED_RUN))
    loss = data["charts"][0]
    assert loss["x"] == {
        "step": [0, 1, 1, 1],
        "tokens": [1_000, 1_000, 1_000, 1_000],
        "time": [20, 30, 40, 50],
    }, "differences, times in tenths of a second"
    assert data["num_steps"] == 4
    values = {curve["label"]: curve["values"] for curve in loss["curves"]}
    assert values == {
        "training": [None, 1.75, 1.5, 1.25],
        "evaluation": [None, 1.9, None, 1.625],
    }
    names = [chart["name"] for chart in data["charts"]]
    assert "loss-by-source" in names, "`code` is evaluated alone"
    assert "learning-rate" not in names, "no step has one"
    assert "loss-by-source" not in [
        chart["name"] for chart in page_data(Columns(PLAIN_RUN))["charts"]
    ]


def test_a_stall_has_its_cause() -> None:
    lines = [metrics_line(step, 2.0) for step in range(20)]
    for step in (0, 8, 10):  # the first step waits for the stream to start
        lines[step] |= {"data/prefetch_queue_depth": 0, "data/wait_seconds": 9.0}
    for step in (8, 9, 10):
        lines[step]["data/encode_seconds"] = 30.0
    (stall,) = find_stalls(Columns(lines))
    assert (stall.first, stall.last, stall.wait_seconds, stall.cause) == (8, 10, 18.0, "encoding")

    for step in (8, 9, 10):
        lines[step]["data/encode_seconds"] = 0.1
    assert "idle" in find_stalls(Columns(lines))[0].cause


def test_thinning_keeps_lows_and_highs() -> None:
    curve = np.sin(np.arange(100_000) / 900)
    curve[777] = 50
    curve[55_555] = -50
    curve[10_000:20_000] = np.nan
    kept = kept_steps([curve, np.full(100_000, 3.0)])
    assert len(kept) <= MAX_POINTS
    assert {0, 777, 55_555, 99_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert kept_steps([curve[:50]]).tolist() == list(range(50))


def test_a_long_run_gives_a_small_page() -> None:
    """A chart has as many points whatever the run has: so this holds for 100,000 steps as well."""
    data = page_data(Columns(lines_of(21_000)))
    assert len(data["charts"]) >= 11
    for chart in data["charts"]:
        num_points = len(chart["x"]["step"])
        assert 1_000 < num_points <= MAX_POINTS
        assert sum(chart["x"]["step"]) == data["num_steps"] - 1, "the last step stays"
    assert len(as_script_data(data)) < 4.5e6


def test_starts_and_skipped_steps_are_marks() -> None:
    starts = [{"first_step": 0, "reason": "new run"}, {"first_step": 60, "reason": "killed"}]
    marks = page_data(Columns(lines_of(100)), starts)["marks"]
    assert [(mark["kind"], mark["at"]["step"]) for mark in marks] == [("start", 60), ("skip", 42)]
    assert marks[1]["text"] == "step 42 skipped: the loss is not finite"


def test_data_cannot_end_their_script() -> None:
    text = as_script_data({"a": "</script><!--<script>&"})
    assert not set("<>&").intersection(text)
    assert json.loads(text) == {"a": "</script><!--<script>&"}


def test_the_page_allows_no_network() -> None:
    rules = policy(is_live=False).split("; ")
    assert rules[0] == "default-src 'none'"
    assert "connect-src 'none'" in rules
    assert "unsafe-inline" not in next(rule for rule in rules if rule.startswith("script-src"))


def test_settings_that_differ_come_first() -> None:
    settings = {
        "save": "/runs/a",
        "save_interval": 0,
        "optimizer": {"lr": 0.5, "weight_decay": 0.1},
        "of_another_version": 1,
    }
    lines = setting_lines(settings)
    shown = {line.name: (line.value, line.is_changed) for line in lines}
    assert shown["--save"] == ("/runs/a", True)
    assert shown["--lr"] == ("0.5", True)
    assert shown["--save-interval"] == ("0", False)
    assert shown["of_another_version"] == ("1", True)
    changed = [line.is_changed for line in lines]
    assert changed == sorted(changed, reverse=True)


@pytest.mark.usefixtures("undrawn")
def test_facts_of_the_newest_start(tmp_path: Path) -> None:
    page = Path(write_report(str(write_full_run(tmp_path, 50)))[0]).read_text()
    for fact in ("NVIDIA H100 80GB HBM3", "4,022,468,096", "2,048 GiB", "megatron-core"):
        assert fact in page
    assert "tensor 2, pipeline 1, data 4, expert 1" in page
    assert "1 h 10 min" in page


@pytest.mark.usefixtures("undrawn")
def test_an_older_run_has_fewer_facts(tmp_path: Path) -> None:
    write_lines(tmp_path / run_folder.METRICS, PLAIN_RUN)
    start = {"start": 1, "time": "2026-11-25 08:00:12Z", "first_step": 0, "world_size": 8}
    write_lines(tmp_path / run_folder.ATTEMPTS, [start | {"reason": "new run"}])
    page = Path(write_report(str(tmp_path))[0]).read_text()
    assert '<th scope="row">ranks</th><td>8</td>' in page
    assert "GPU</th>" not in page
    assert "What this page does not show" not in page
