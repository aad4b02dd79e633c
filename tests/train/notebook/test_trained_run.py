"""What `miles.train.run` returns: a line of text, and a box with the curve."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

from miles.train.notebook.trained_run import TrainedRun, curve

RUN = TrainedRun(
    folder="runs/<first>",
    checkpoint="runs/<first>/iter_0000003",
    num_steps=3,
    losses=(4.0, 3.0, 2.0),
    tokens_seen=1234,
    export=None,
    stopped_by=None,
)


def test_a_run_is_one_line() -> None:
    assert repr(RUN) == (
        "<run runs/<first>: 3 steps, finished, loss 4.000 -> 2.000, 1,234 trained tokens>"
    )
    assert RUN.last_step == 2
    stopped = replace(RUN, stopped_by="Ctrl-C", num_steps=1, losses=(4.0,))
    assert "1 step, stopped by Ctrl-C, loss" in repr(stopped)
    empty = replace(RUN, num_steps=0, losses=(), stopped_by="Ctrl-C")
    assert repr(empty) == "<run runs/<first>: 0 steps, stopped by Ctrl-C>"


def test_the_box_names_all_places(tmp_path: Path) -> None:
    box = RUN._repr_html_()
    ElementTree.fromstring(box)  # noqa: S314
    assert "runs/&lt;first&gt;" in box
    assert "miles.report.write_report(" in box
    assert "Hugging Face" not in box

    (tmp_path / "report.html").touch()
    here = replace(RUN, folder=str(tmp_path), export="out")._repr_html_()
    assert f"{tmp_path}/report.html" in here
    assert "none yet" not in here
    assert "Hugging Face" in here


def test_the_curve_falls_and_has_gaps() -> None:
    svg = ElementTree.fromstring(curve([4.0, math.nan, 3.0, 1.0]))  # noqa: S314
    lines = svg.findall("polyline")
    heights = [
        float(point.split(",")[1]) for line in lines for point in line.get("points", "").split()
    ]
    assert [len(line.get("points", "").split()) for line in lines] == [1, 2]
    assert heights == sorted(heights), "a lower loss lies lower"
    assert svg.get("aria-label") == "loss from 4.000 to 1.000 over 4 steps"
    assert curve([]) == curve([1.0]) == curve([math.nan, math.nan]) == ""
    assert curve([2.0] * 10_000).split("points=")[1].count(",") <= 483
