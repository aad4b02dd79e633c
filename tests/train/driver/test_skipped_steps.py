"""Skipped steps: counted over restarts, named, and limited in a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles.common import run_folder
from miles.errors import DivergedError
from miles.train.driver.skipped_steps import SkippedSteps
from miles.train.types import Skip, SkipReason, StepResult
from tests.support.fault_table import SINCE, observed


def result(skip: Skip | None = None) -> StepResult:
    return StepResult((1.0,), (1,), 1.0, 1e-3, 0.1, skip)


def locate(row: int) -> tuple[str, str, int]:
    return "chat", "rows.jsonl", row + 100


BAD = result(Skip(SkipReason.LOSS_NOT_FINITE, (1, 2, 3, 4, 5)))


def test_a_good_step_begins_the_count_anew(tmp_path: Path) -> None:
    skips = SkippedSteps(str(tmp_path), 2, 0, 0, locate)
    for step in range(20):
        sentence = skips.record(step, result() if step % 3 == 2 else BAD)
        assert bool(sentence) == (step % 3 != 2)
    assert skips.num_skipped == 14
    assert sentence.startswith(
        "step 19 skipped: the loss is not finite; row 101 of rows.jsonl, row 102"
    )
    assert sentence.endswith(f"and 2 more (see {tmp_path / run_folder.SKIPPED_STEPS})")

    skips.record(20, result())
    skips.record(21, BAD)
    skips.record(22, BAD)
    with pytest.raises(
        DivergedError, match="3 steps in a row were skipped, more than --max-skipped-steps 2"
    ):
        skips.record(23, BAD)


@pytest.mark.parametrize(
    "reason", [SkipReason.NOTHING_TO_TRAIN, SkipReason.LOSS_SCALE_TOO_HIGH], ids=["rows", "scale"]
)
def test_some_reasons_are_no_sign_of_divergence(tmp_path: Path, reason: SkipReason) -> None:
    skips = SkippedSteps(str(tmp_path), 0, 0, 0, locate)
    for step in range(5):
        assert skips.record(step, result(Skip(reason))) == f"step {step} skipped: {reason}"
    assert skips.num_skipped == 5
    assert not (tmp_path / run_folder.SKIPPED_STEPS).exists()


def test_a_resumed_run_forgets_the_later_steps(tmp_path: Path) -> None:
    skips = SkippedSteps(str(tmp_path), 9, 0, 0, locate)
    for step in range(4):
        skips.record(step, BAD)
    again = SkippedSteps(str(tmp_path), 9, 2, 2, locate)
    again.record(2, result())
    again.record(3, BAD)
    lines = [
        json.loads(line) for line in (tmp_path / run_folder.SKIPPED_STEPS).read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [0, 1, 3]
    assert lines[0]["rows"][0] == {"source": "chat", "file": "rows.jsonl", "row": 101}
    assert again.num_skipped == 3


def test_broken_weights_end_the_run_and_blame_no_row(tmp_path: Path) -> None:
    skips = SkippedSteps(str(tmp_path), 10, 0, 0, locate)
    weights = tuple(f"model.layers.{layer}.mlp.up_proj.weight (1 value)" for layer in range(5))
    skip = Skip(SkipReason.LOSS_NOT_FINITE, weights=weights)
    with pytest.raises(DivergedError) as ended:
        skips.record(7, result(skip))
    text = str(ended.value)
    assert "model.layers.2.mlp.up_proj.weight (1 value) and 2 more. No row is to blame" in text
    observed("weights became NaN", text, "No row is to blame", SINCE)
    assert not (tmp_path / run_folder.SKIPPED_STEPS).exists()
