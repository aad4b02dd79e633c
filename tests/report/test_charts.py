"""The curves of a run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from miles.report.charts import loss_chart, run_chart
from tests.support.metrics_lines import EVALUATED_RUN, PLAIN_RUN


def curves(lines: list[dict[str, Any]], panel: int) -> dict[str, list[tuple[float, float]]]:
    """Return the points of a panel's curves by label."""
    drawn = run_chart(lines).axes[panel].get_lines()
    return {
        str(curve.get_label()): list(map(tuple, np.asarray(curve.get_xydata()).tolist()))
        for curve in drawn
    }


def test_evaluations_are_curves_beside_the_loss() -> None:
    assert list(curves(PLAIN_RUN, 0)) == ["sft/loss"]
    assert list(curves(PLAIN_RUN, 1)) == ["sft/loss/chat"]

    drawn = curves(EVALUATED_RUN, 0)
    assert drawn["sft/loss"][1:] == [(1, 1.75), (2, 1.5), (3, 1.25)]
    assert math.isnan(drawn["sft/loss"][0][1]), "a gap"
    assert [step for step, _ in drawn["eval/loss"]] == [1, 2, 3]
    assert drawn["eval/loss"][2] == (3, 1.625)

    by_source = curves(EVALUATED_RUN, 1)
    assert list(by_source) == ["sft/loss/chat", "eval/loss/chat", "eval/loss/code"]
    assert by_source["eval/loss/chat"] == [(1, 1.8), (2, 1.7), (3, 1.5)]
    chat = [curve.get_color() for curve in run_chart(EVALUATED_RUN).axes[1].get_lines()][:2]
    assert chat[0] == chat[1], "a source has one colour"


def test_the_legend_names_a_source_once() -> None:
    """`code` is in evaluations alone."""
    panel = run_chart(EVALUATED_RUN).axes[1]
    legend = panel.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["chat", "code"]
    assert panel.get_title(loc="left") == "loss by source (dashed: eval/loss)"
    assert run_chart(PLAIN_RUN).axes[1].get_title(loc="left") == "loss by source"


def test_the_small_chart_has_the_loss_only() -> None:
    (panel,) = loss_chart(EVALUATED_RUN).axes
    assert [str(curve.get_label()) for curve in panel.get_lines()] == ["sft/loss", "eval/loss"]
