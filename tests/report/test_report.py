"""The report of a run, from metrics.jsonl (`null` where a number is not finite) and other files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from miles.common import run_folder
from miles.report.report import write_report
from miles.report.run_data import MAX_ANSWERS
from tests.support.metrics_lines import EVALUATED_RUN, PLAIN_RUN, write_lines


def page_of(folder: Path, lines: list[dict[str, Any]]) -> str:
    """Write metrics.jsonl and the report; return the page."""
    write_lines(folder / run_folder.METRICS, lines)
    return Path(write_report(str(folder))[0]).read_text()


def answer(step: int, row: int, text: str, *, ended: bool = True) -> dict[str, Any]:
    return {
        "step": step,
        "source": "chat",
        "file": "chat.jsonl",
        "row": row,
        "prompt": "2 + 2?",
        "answer": text,
        "expected": "four",
        "ended": ended,
    }


def test_the_numbers_on_top(tmp_path: Path) -> None:
    """Here with its pictures."""
    plain = page_of(tmp_path, PLAIN_RUN)
    assert "<b>2.000</b><span>loss, first step</span>" in plain
    assert "<b>1.250</b><span>loss, last step</span>" in plain
    assert "<b>750</b><span>tokens per second</span>" in plain, (
        "9,000 tokens in 3 + 4 + 5 s, after the first step"
    )
    for absent in ("evaluation</span>", "MFU</span>", "skipped steps</span>"):
        assert absent not in plain

    evaluated = page_of(tmp_path, EVALUATED_RUN)
    assert "<b>not finite</b><span>loss, first step</span>" in evaluated
    assert "<b>1.625</b><span>loss, evaluation</span>" in evaluated
    assert "<b>39.2%</b><span>MFU</span>" in evaluated, "(3 x 0.4 + 4 x 0.5 + 5 x 0.3) / 12"
    assert "<b>1</b><span>skipped steps</span>" in evaluated
    assert (tmp_path / run_folder.LOSS_CHART).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("undrawn")
def test_a_run_of_adapters_says_so(tmp_path: Path) -> None:
    lora = {"rank": 8, "alpha": 16.0, "target_modules": ["all-linear"], "exclude_modules": []}
    settings = tmp_path / run_folder.CONFIG
    settings.write_text(json.dumps({"lora": lora}))
    assert "LoRA of rank 8, alpha 16, on all-linear" in page_of(tmp_path, PLAIN_RUN)

    for content in ({"lora": {**lora, "rank": 0}}, {}):
        settings.write_text(json.dumps(content))
        assert "LoRA" not in page_of(tmp_path, PLAIN_RUN)


@pytest.mark.usefixtures("undrawn")
def test_skipped_steps_name_their_rows(tmp_path: Path) -> None:
    assert "Skipped steps</h2>" not in page_of(tmp_path, PLAIN_RUN)

    rows = [{"source": "chat", "file": "chat.jsonl", "row": row} for row in range(10, 15)]
    write_lines(
        tmp_path / run_folder.SKIPPED_STEPS,
        [
            {"step": 2, "reason": "the loss is not finite", "rows": rows[:1]},
            {"step": 3, "reason": "the gradient is not finite", "rows": rows},
        ],
    )
    page = page_of(tmp_path, EVALUATED_RUN)

    one_row = '<td class="text">row 10 of chat.jsonl</td>'
    assert f"<td>2</td><td>the loss is not finite</td>{one_row}" in page
    names = "\n".join(f"row {row} of chat.jsonl" for row in (10, 11, 12))
    many_rows = f'<td class="text">{names}\nand 2 more</td>'
    assert f"<td>3</td><td>the gradient is not finite</td>{many_rows}" in page


@pytest.mark.usefixtures("undrawn")
def test_several_starts_are_shown(tmp_path: Path) -> None:
    begun = {"time": "2026-11-25 08:00:12Z", "world_size": 8}
    again = "the same command again, after SIGTERM"
    first = {"start": 1, "reason": "new run", "first_step": 0, **begun}
    killed = {"start": 2, "reason": again, "first_step": 137, **begun}
    last = {"start": 3, "reason": "it was killed", "first_step": 1200, **begun}

    write_lines(tmp_path / run_folder.ATTEMPTS, [first])
    assert "Starts</h2>" not in page_of(tmp_path, PLAIN_RUN)

    write_lines(tmp_path / run_folder.ATTEMPTS, [first, {"end": 1, "how": "SIGTERM"}, killed, last])
    page = page_of(tmp_path, PLAIN_RUN)
    row = f'<td class="text">{again}</td><td class="text">killed</td>'
    assert f"<td>2026-11-25 08:00:12Z</td><td>137</td><td>8</td>{row}" in page
    row = '<td class="text">it was killed</td><td class="text"></td>'
    assert f"<td>1,200</td><td>8</td>{row}" in page


@pytest.mark.usefixtures("undrawn")
def test_the_last_answers_are_shown_escaped(tmp_path: Path) -> None:
    assert "What it answers" not in page_of(tmp_path, PLAIN_RUN)

    later = [answer(4, row, f"<b>four</b> {row}", ended=row > 0) for row in range(MAX_ANSWERS + 1)]
    write_lines(tmp_path / run_folder.EVAL_SAMPLES, [answer(2, 0, "an older one"), *later])
    page = page_of(tmp_path, EVALUATED_RUN)

    assert "What it answers after step 4" in page
    assert "Its answers over time (1 earlier)" in page
    assert '<th scope="row">after step 2</th>' in page
    assert page.count("an older one") == 1
    assert page.count('<table class="answer facts">') == MAX_ANSWERS
    assert "&lt;b&gt;four&lt;/b&gt; 0 …</div>" in page, "cut before its end"
    assert "&lt;b&gt;four&lt;/b&gt; 1</div>" in page


@pytest.mark.usefixtures("undrawn")
def test_the_ledger_says_what_is_not_used(tmp_path: Path) -> None:
    counts = {"read": 9, "trained": 7, "unknown_role": 2}
    entry = {"row_shape": "messages", "rows": 9, "epochs": 1.0, "counts": counts}
    path = tmp_path / run_folder.LEDGER
    path.write_text(json.dumps({"chat": entry}))
    older = page_of(tmp_path, PLAIN_RUN)
    assert "<td>2 unknown_role</td>" in older
    assert "not used" not in older

    names = {"keys_not_used": {"<mood>": 3}, "columns_not_used": ["id"], "left_out": []}
    path.write_text(json.dumps({"chat": entry | names}))
    page = page_of(tmp_path, PLAIN_RUN)
    assert "<th>keys not used</th><td>&lt;mood&gt; (3 rows)</td>" in page
    assert "<th>columns not used</th><td>id</td>" in page
    assert "<th>what to do</th><td>unknown_role: say what the role means" in page
    assert "files left out" not in page
