"""Whether a run may begin anew in a folder without a tracker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from miles.common import run_folder, storage
from miles.common.checkpoint_tracker import folder_name
from miles.common.run_record import (
    missing_lines_notice,
    require_new,
    require_own_run_folder,
    require_position,
)
from miles.errors import CheckpointError, ConfigError
from tests.support.checkpoints import write_checkpoint

NEVER = {"start": 1, "first_step": 0, "checkpoint": "hf", "first_checkpoint": None}
OLDER = {"start": 1, "first_step": 0, "checkpoint": "hf"}
KILLED_END = {"end": 1, "how": "LostError: trainer 1 died", "next_step": 9}
SAVED_END = {"end": 1, "how": "SIGTERM", "next_step": 9}


def make(
    save: str,
    iterations: tuple[int, ...] = (),
    entries: tuple[dict[str, Any], ...] = (),
    num_metrics: int = 0,
) -> None:
    """Write what a run may have left in its folder."""
    for iteration in iterations:
        write_checkpoint(save, iteration)
    if entries:
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        storage.write_text(storage.join(save, run_folder.ATTEMPTS), lines)
    if num_metrics:
        storage.write_text(storage.join(save, run_folder.METRICS), '{"step": 0}\n' * num_metrics)


@pytest.mark.parametrize(
    "left",
    [
        {},
        {"entries": (NEVER,), "num_metrics": 9},
        {"entries": (NEVER, KILLED_END, {**NEVER, "start": 2}), "num_metrics": 9},
        {"entries": (NEVER,), "iterations": (20,), "num_metrics": 21},  # named, but not yet tracked
        {"entries": (OLDER, KILLED_END), "num_metrics": 9},
        {"entries": ({**NEVER, "first_step": 40, "checkpoint": "/other/iter_0000040"},)},
        {"num_metrics": 0},
    ],
)
def test_run_without_a_checkpoint_begins_anew(tmp_path: Path, left: dict[str, Any]) -> None:
    """It was killed before its first one, and the same command must go on."""
    make(str(tmp_path), **left)
    require_new(str(tmp_path), str(tmp_path))


@pytest.mark.parametrize(
    ("left", "text"),
    [
        ({"iterations": (20, 40)}, "names no checkpoint of a run.* step 40: echo 40 >"),
        ({"iterations": (20,), "entries": (OLDER,)}, "step 20: echo 20 > .* another --save"),
        ({"iterations": (20, 40), "entries": (NEVER,)}, "step 40: echo 40 >"),
        ({"iterations": (20,), "entries": ({**NEVER, "first_checkpoint": 20},)}, "step 20: echo"),
        ({"entries": ({**NEVER, "first_checkpoint": 20},)}, "is of a run that had checkpoints"),
        ({"entries": (OLDER, SAVED_END)}, "is of a run that had checkpoints"),
        ({"num_metrics": 3}, r"metrics\.jsonl: holds the metrics of a run"),
    ],
)
def test_run_that_had_checkpoints_is_not_begun_anew(
    tmp_path: Path, left: dict[str, Any], text: str
) -> None:
    make(str(tmp_path), **left)
    with pytest.raises(CheckpointError, match=text):
        require_new(str(tmp_path), str(tmp_path))


def test_run_that_went_on_in_its_folder_had_checkpoints(tmp_path: Path) -> None:
    start = {**OLDER, "first_step": 40, "checkpoint": str(tmp_path / "iter_0000040")}
    make(str(tmp_path), entries=(start,))
    with pytest.raises(CheckpointError, match="is of a run that had checkpoints"):
        require_new(str(tmp_path), str(tmp_path))


def test_checkpoint_without_its_position_is_not_begun_anew(tmp_path: Path) -> None:
    """Of Megatron-LM's, which never have one, the weights are taken."""
    save = str(tmp_path)
    make(save, iterations=(20, 40))
    (tmp_path / folder_name(20) / "miles.json").write_text('{"cursor": {}}')
    require_position(f"{save}/{folder_name(40)}", save, save)
    make(save, entries=({**NEVER, "first_checkpoint": 20},))
    with pytest.raises(CheckpointError, match=r"0000040/miles\.json: no such file.* put 20 into"):
        require_position(f"{save}/{folder_name(40)}", save, save)


def test_broken_record_does_not_begin_anew_over_a_checkpoint(tmp_path: Path) -> None:
    make(str(tmp_path), iterations=(20,), entries=(NEVER,))
    with (tmp_path / run_folder.ATTEMPTS).open("a") as stream:
        stream.write("\0\0\n")
    with pytest.raises(CheckpointError, match="step 20: echo 20 >"):
        require_new(str(tmp_path), str(tmp_path))


def test_uploads_that_never_ended_are_no_checkpoints(bucket: str) -> None:
    """In a bucket, an upload has its final name from the beginning."""
    make(f"{bucket}/run", iterations=(20, 40), entries=(NEVER,), num_metrics=50)
    require_new(f"{bucket}/run", f"{bucket}/run")
    make(f"{bucket}/run", entries=({**NEVER, "first_checkpoint": 20},))
    with pytest.raises(CheckpointError, match=r"echo 40 \| aws s3 cp - s3://bucket/run/latest"):
        require_new(f"{bucket}/run", f"{bucket}/run")


def test_output_dir_of_another_run_is_refused(tmp_path: Path) -> None:
    logs, save, other = (str(tmp_path / name) for name in ("logs", "save", "other"))
    require_own_run_folder(save, logs)
    make(logs, num_metrics=3)
    require_own_run_folder(save, logs)
    storage.write_text(storage.join(logs, run_folder.CONFIG), json.dumps({"save": other}))
    require_own_run_folder(save, logs)  # the run's folders were moved
    make(other, iterations=(20,))
    with pytest.raises(ConfigError, match=rf"--output-dir {logs}: .* --save is {other}"):
        require_own_run_folder(save, logs)
    require_own_run_folder(other, logs)
    require_own_run_folder(logs, logs)


def test_lost_lines_of_metrics_are_told(tmp_path: Path) -> None:
    make(str(tmp_path), num_metrics=3)
    assert missing_lines_notice(str(tmp_path), 3) is None
    notice = missing_lines_notice(str(tmp_path), 40)
    assert notice is not None
    assert "has 3 of the 40 lines" in notice


def test_metrics_that_cannot_be_read_end_nothing(tmp_path: Path) -> None:
    """They are mended when the run goes on; what is left of them counts until then."""
    (tmp_path / run_folder.METRICS).write_bytes(b'{"step": 0}\n\xff\xfe\n{"step": 2}\n')
    assert missing_lines_notice(str(tmp_path), 2) is None
    assert missing_lines_notice(str(tmp_path), 3) is not None
    with pytest.raises(CheckpointError, match="holds the metrics of a run"):
        require_new(str(tmp_path), str(tmp_path))
