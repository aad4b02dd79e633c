"""A cursor that does not fit names the flags that one types, and values that one can give."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace

import pytest

from miles.data.cursor_differences import FLAGS, INPUTS
from miles.data.types import Cursor
from miles.errors import CheckpointError
from miles.train.config import TrainConfig
from miles.train.launch.parser import launch_settings

CURSOR = Cursor(0, 42, True, 96, 32, False, (3, 1), "m" * 32, "e" * 32, empty_answer="drop")


def refused(**changes: object) -> str:
    with pytest.raises(CheckpointError) as raised:
        CURSOR.require_same_data(replace(CURSOR, **changes), "run/iter_0000002")  # type: ignore[arg-type]
    return str(raised.value)


def test_every_field_has_flags_that_exist() -> None:
    fields = asdict(CURSOR).keys() - {*Cursor.COUNTS, "version"}
    assert fields == FLAGS.keys() | INPUTS.keys()
    named = {*FLAGS.values(), *re.findall(r"--[a-z-]+", " ".join(INPUTS.values()))}
    assert named <= {*launch_settings(TrainConfig), "--hf-checkpoint", "--prompt-data"}


def test_values_are_shown_as_one_gives_them() -> None:
    error = refused(seed=9, shuffle=False, mixture=())
    assert "Give the old values, or start anew" in error
    assert "\n  --rollout-seed: the checkpoint has 42, this run 9\n" in error
    assert "\n  --rollout-shuffle: the checkpoint has it on, this run it off\n" in error
    assert error.endswith("\n  --prompt-data-weights: the checkpoint has 3 1, this run none")


def test_no_hash_is_asked_for() -> None:
    files = refused(manifest_fingerprint="n" * 32)
    assert "Bring the old ones back, or start anew" in files
    assert "--prompt-data or --split: other files than the checkpoint's, or files" in files
    tokens = refused(encoder_fingerprint="f" * 32)
    assert "--hf-checkpoint or --chat-template-path: another tokenizer" in tokens
    assert "old values" not in files + tokens
    assert not re.search(r"(\w)\1{31}", files + tokens)
    both = refused(manifest_fingerprint="n" * 32, batch_size=16)
    assert "Give the old values, and bring the old files back, or start anew" in both


def test_an_old_cursor_matches_any_value_of_a_new_setting() -> None:
    fields = json.loads(CURSOR.to_json())
    del fields["empty_answer"]
    old = Cursor.from_json(json.dumps(fields), "run")
    for policy in ("drop", "train"):
        old.require_same_data(replace(CURSOR, empty_answer=policy), "run")
    error = refused(empty_answer="train")
    assert error.endswith("\n  --empty-answer: the checkpoint has drop, this run train")
