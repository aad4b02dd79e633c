"""What a checkpoint keeps beside the weights."""

from __future__ import annotations

import json
import math

import pytest

from miles.common.checkpoint_folder import SavedCheckpoint
from miles.data.types import Cursor
from miles.train.driver.resume_state import ResumeState
from miles.train.precision import Precision
from miles.train.types import StartPoint

CURSOR = Cursor(
    consumed_rows=64,
    seed=1,
    shuffle=True,
    window_rows=32,
    batch_size=16,
    drop_last=False,
    mixture=(),
    manifest_fingerprint="aa",
    encoder_fingerprint="bb",
    tokens_seen=1000,
    ledger_totals={"chat": {"read": 64, "trained": 64}},
)


def test_a_resumed_run_continues_from_what_was_kept() -> None:
    state = ResumeState(
        CURSOR,
        num_metrics_lines=4,
        num_skipped_steps=1,
        eval_loss=2.5,
        chat_template="",
        precision=Precision.BF16,
    )
    kept = json.loads(json.dumps(state.to_json()))
    start = StartPoint(SavedCheckpoint("run/iter_0000004", 4, kept), is_resume=True)
    assert ResumeState.of(start) == state
    assert start.next_step == 4


def test_the_file_has_these_keys() -> None:
    assert ResumeState(CURSOR).to_json() == {
        "cursor": json.loads(CURSOR.to_json()),
        "metrics_lines": 0,
        "skipped_steps": 0,
        "eval_loss": None,
    }
    with_template = ResumeState(CURSOR, chat_template="{{ messages }}").to_json()
    assert with_template == {**ResumeState(CURSOR).to_json(), "chat_template": "{{ messages }}"}
    with_precision = ResumeState(CURSOR, precision=Precision.FP32).to_json()
    assert with_precision == {**ResumeState(CURSOR).to_json(), "precision": "float32"}


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_a_loss_that_cannot_be_compared_is_null(loss: float | None) -> None:
    assert ResumeState(CURSOR, eval_loss=loss).to_json()["eval_loss"] is None


def test_older_checkpoints_have_a_cursor_alone() -> None:
    kept = {"cursor": json.loads(CURSOR.to_json())}
    start = StartPoint(SavedCheckpoint("run/iter_0000004", 4, kept), is_resume=True)
    assert ResumeState.of(start) == ResumeState(CURSOR)


def test_a_run_that_takes_only_the_weights_begins_anew() -> None:
    kept = ResumeState(CURSOR, num_metrics_lines=4).to_json()
    start = StartPoint(SavedCheckpoint("run/iter_0000004", 4, kept), is_resume=False)
    assert ResumeState.of(start) == ResumeState()
    assert start.next_step == 0
