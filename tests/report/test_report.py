"""What the report says of a run, from metrics.jsonl (`null` where a number is not finite) and its other files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles.common import run_folder
from miles.errors import SourceError
from miles.report.report import MAX_ANSWERS, chart, read_metrics, write_report


def line(step: int, loss: float | None, **more: float | None) -> dict[str, Any]:
    return {
        "step": step,
        "sft/loss": loss,
        "sft/loss/chat": loss,
        "sft/epoch": step / 4,
        "sft/tokens_seen": 1_000 * (step + 1),
        "sft/skipped_steps": 0,
        "data/prefetch_queue_depth": 4,
        "data/wait_seconds": 0.0,
        **{f"data/{stage}_seconds": 0.1 for stage in ("read", "normalize", "encode", "pack")},
        "data/num_tokens": 3_000,
        "perf/step_seconds": 2.0 + step,
        "perf/tokens_per_second": 1_500.0,
        **more,
    }


PLAIN = [line(step, 2.0 - step / 4) for step in range(4)]
EVALUATED = [
    line(0, None, **{"perf/mfu": 0.1}),
    line(
        1, 1.75, **{"perf/mfu": 0.4, "eval/loss": 1.9, "eval/loss/chat": 1.8, "eval/loss/code": 2.0}
    ),
    line(
        2,
        1.5,
        **{"perf/mfu": 0.5, "eval/loss": None, "eval/loss/chat": 1.7, "eval/loss/code": None},
    ),
    line(
        3,
        1.25,
        **{"perf/mfu": 0.3, "eval/loss": 1.625, "eval/loss/chat": 1.5, "sft/skipped_steps": 1},
    ),
]


def page_of(folder: Path, lines: list[dict[str, Any]]) -> str:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return Path(write_report(str(folder))[0]).read_text()


def curves(lines: list[dict[str, Any]], panel: int) -> dict[str, list[tuple[float, float]]]:
    drawn = chart(lines).axes[panel].get_lines()
    return {
        str(curve.get_label()): list(map(tuple, np.asarray(curve.get_xydata()).tolist()))
        for curve in drawn
    }


def test_the_numbers_on_top(tmp_path: Path) -> None:
    plain = page_of(tmp_path, PLAIN)
    assert "<b>2.000</b><span>loss, first step</span>" in plain
    assert "<b>1.250</b><span>loss, last step</span>" in plain
    assert "<b>750</b><span>tokens per second</span>" in plain, (
        "9,000 tokens in 3 + 4 + 5 s, after the first step"
    )
    for absent in ("evaluation</span>", "MFU</span>", "skipped steps</span>"):
        assert absent not in plain

    evaluated = page_of(tmp_path, EVALUATED)
    assert "<b>not finite</b><span>loss, first step</span>" in evaluated
    assert "<b>1.625</b><span>loss, evaluation</span>" in evaluated
    assert "<b>39.2%</b><span>MFU</span>" in evaluated, "(3 x 0.4 + 4 x 0.5 + 5 x 0.3) / 12"
    assert "<b>1</b><span>skipped steps</span>" in evaluated
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_evaluations_are_curves_beside_the_loss() -> None:
    assert list(curves(PLAIN, 0)) == ["sft/loss"]
    assert list(curves(PLAIN, 1)) == ["sft/loss/chat"]
    drawn = curves(EVALUATED, 0)
    assert drawn["sft/loss"][1:] == [(1, 1.75), (2, 1.5), (3, 1.25)]
    assert math.isnan(drawn["sft/loss"][0][1]), "a gap"
    assert [step for step, _ in drawn["eval/loss"]] == [1, 2, 3]
    assert drawn["eval/loss"][2] == (3, 1.625)
    by_source = curves(EVALUATED, 1)
    assert list(by_source) == ["sft/loss/chat", "eval/loss/chat", "eval/loss/code"]
    assert by_source["eval/loss/chat"] == [(1, 1.8), (2, 1.7), (3, 1.5)]
    chat = [curve.get_color() for curve in chart(EVALUATED).axes[1].get_lines()][:2]
    assert chat[0] == chat[1], "a source has one colour"


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"metrics\.jsonl: no such file; expected the folder of a run"
    ):
        read_metrics(str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(SourceError, match="no step was trained yet"):
        read_metrics(str(tmp_path))


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def answer(step: int, row: int, said: str, *, ended: bool = True) -> dict[str, Any]:
    where = {"step": step, "source": "chat", "file": "chat.jsonl", "row": row}
    return {**where, "prompt": "2 + 2?", "answer": said, "expected": "four", "ended": ended}


def test_skipped_steps_are_named_with_their_rows(tmp_path: Path) -> None:
    assert "Skipped steps</h2>" not in page_of(tmp_path, PLAIN)
    rows = [{"source": "chat", "file": "chat.jsonl", "row": row} for row in range(10, 15)]
    write_lines(
        tmp_path / run_folder.SKIPPED_STEPS,
        [
            {"step": 2, "reason": "the loss is not finite", "rows": rows[:1]},
            {"step": 3, "reason": "the gradient is not finite", "rows": rows},
        ],
    )
    page = page_of(tmp_path, EVALUATED)
    assert (
        '<td>2</td><td>the loss is not finite</td><td class="text">row 10 of chat.jsonl</td>'
        in page
    )
    named = "\n".join(f"row {row} of chat.jsonl" for row in (10, 11, 12))
    assert (
        f'<td>3</td><td>the gradient is not finite</td><td class="text">{named}\nand 2 more</td>'
        in page
    )


def test_starts_are_shown_where_there_was_more_than_one(tmp_path: Path) -> None:
    begun = {"time": "2026-11-25 08:00:12Z", "world_size": 8}
    first = {"start": 1, "reason": "new run", "first_step": 0, **begun}
    write_lines(tmp_path / run_folder.ATTEMPTS, [first])
    assert "Starts</h2>" not in page_of(tmp_path, PLAIN)
    killed = {
        "start": 2,
        "reason": "the same command again, after SIGTERM",
        "first_step": 137,
        **begun,
    }
    last = {"start": 3, "reason": "it was killed", "first_step": 1200, **begun}
    write_lines(tmp_path / run_folder.ATTEMPTS, [first, {"end": 1, "how": "SIGTERM"}, killed, last])
    page = page_of(tmp_path, PLAIN)
    row = '<td class="text">the same command again, after SIGTERM</td><td class="text">killed</td>'
    assert f"<td>2026-11-25 08:00:12Z</td><td>137</td><td>8</td>{row}" in page
    assert (
        '<td>1,200</td><td>8</td><td class="text">it was killed</td><td class="text"></td>' in page
    )


def test_the_last_evaluations_answers_are_shown_and_escaped(tmp_path: Path) -> None:
    assert "What it answers" not in page_of(tmp_path, PLAIN)
    later = [answer(4, row, f"<b>four</b> {row}", ended=row > 0) for row in range(MAX_ANSWERS + 1)]
    write_lines(tmp_path / run_folder.EVAL_SAMPLES, [answer(2, 0, "an older one"), *later])
    page = page_of(tmp_path, EVALUATED)
    assert "What it answers after step 4" in page
    assert "an older one" not in page
    assert page.count('<table class="answer">') == MAX_ANSWERS
    assert "&lt;b&gt;four&lt;/b&gt; 0 …</div>" in page, "cut before its end"
    assert "&lt;b&gt;four&lt;/b&gt; 1</div>" in page


def test_the_legend_names_a_source_once() -> None:
    """`code` is in evaluations alone."""
    panel = chart(EVALUATED).axes[1]
    legend = panel.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["chat", "code"]
    assert panel.get_title() == "loss by source (dashed: eval/loss)"
    assert chart(PLAIN).axes[1].get_title() == "loss by source"
