"""A run by its files, where no tracker tells of it: may a run begin anew in this folder?

A run that was killed before its first checkpoint begins anew by the same command. A run that had
checkpoints, and whose tracker is gone, must not: it would train from step 0 and overwrite them.
`starts.jsonl` tells the two apart: each start there has `first_checkpoint`, the first one that it
completed.

    {"start": 1, …, "first_step": 0, "first_checkpoint": null}     killed before: begins anew
    {"start": 1, …, "first_step": 0, "first_checkpoint": 20}       it had one: refused
    {"start": 1, …, "first_step": 0}                               an older version: the folders of
                                                                   checkpoints and the ends decide
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from miles.common import own_files, run_folder, storage
from miles.common.checkpoint_choice import ways_on
from miles.common.checkpoint_files import iterations
from miles.common.checkpoint_folder import EXTRA, other_ways
from miles.common.checkpoint_tracker import TRACKER
from miles.common.redact import redact
from miles.errors import BrokenFileError, CheckpointError, ConfigError

FIRST_CHECKPOINT = "first_checkpoint"
"""Key of a start: the iteration of the first checkpoint that it completed; None: none yet."""
_SAVED_ENDS = ("the last step", "SIGTERM", "SIGHUP", "Ctrl-C")
"""Ends, in the words of an older version, before which a checkpoint was completed."""


def require_new(save: str, run_dir: str) -> None:
    """Refuse to begin a run anew where one has been, and has had checkpoints.

    Args:
        save: a folder without a checkpoint that a tracker names.
        run_dir: the run folder.

    Raises:
        CheckpointError: says what is there, and which line goes on from it.
    """
    is_own = _other_save(save, run_dir) is None  # else `require_own_run_folder` refuses it
    records = own_files.read_records(storage.join(run_dir, run_folder.ATTEMPTS))
    entries = records.objects if is_own else ()
    starts = [entry for entry in entries if "start" in entry]

    is_told = is_own and not records.broken
    # An incomplete one counts: it may be all that is left of a run.
    there = iterations(save)
    if there and not (is_told and _may_be_unnamed(save, there, starts)):
        raise CheckpointError(
            f"{redact(save)}: {TRACKER} names no checkpoint of a run, and a new run would "
            f"overwrite those that are there. {ways_on(save)}. To begin anew, give another --save"
        )
    if there or not is_own:
        return

    is_saved = any(entry.get("how") in _SAVED_ENDS for entry in entries)
    if is_saved or any(_had_checkpoint(start, save) for start in starts):
        raise CheckpointError(
            f"{redact(save)}: {run_folder.ATTEMPTS} in {redact(run_dir)} is of a run that had "
            f"checkpoints, and {TRACKER} names none: a new run would overwrite its metrics. Bring "
            "the checkpoints back, or begin anew with another --save"
        )

    metrics = storage.join(run_dir, run_folder.METRICS)
    if not starts and _has_lines(metrics):
        raise CheckpointError(
            f"{redact(metrics)}: holds the metrics of a run, and there is neither its "
            f"{run_folder.ATTEMPTS} nor a checkpoint in {redact(save)} ({TRACKER} is missing): a "
            "new run would overwrite them. Give another --save or --output-dir"
        )


def require_position(checkpoint: str, save: str, run_dir: str) -> None:
    """Refuse a checkpoint of a run of ours that has lost its place in the data.

    Without `miles.json`, it would pass for one of Megatron-LM, whose weights begin a new run.

    Args:
        checkpoint: its folder, in `save`; it has no `miles.json`.

    Raises:
        CheckpointError: says what can be done.
    """
    records = own_files.read_records(storage.join(run_dir, run_folder.ATTEMPTS))
    starts = [entry for entry in records.objects if "start" in entry]
    if any(_had_checkpoint(start, save) for start in starts):
        raise CheckpointError(
            f"{redact(storage.join(checkpoint, EXTRA))}: no such file. It holds the place in the "
            f"data, and nothing can go on without it. {other_ways(checkpoint)}"
        )


def require_own_run_folder(save: str, run_dir: str) -> None:
    """Refuse an `--output-dir` with the metrics of a run that has another `--save`.

    Raises:
        ConfigError: names the other run's folder.
    """
    other = _other_save(save, run_dir)
    if other is not None:
        raise ConfigError(
            f"--output-dir {redact(run_dir)}: holds the metrics of another run, whose --save is "
            f"{redact(other)}; this one would overwrite them. Give another --output-dir, or that "
            "--save"
        )


def _other_save(save: str, run_dir: str) -> str | None:
    """Return the `--save` of the run whose metrics a folder holds; None: it is not another run's.

    Where that `--save` is gone, the run was moved, both of its folders perhaps.
    """
    config = storage.join(run_dir, run_folder.CONFIG)
    metrics = storage.join(run_dir, run_folder.METRICS)
    if storage.is_same(save, run_dir) or not storage.exists(config) or not storage.exists(metrics):
        return None
    try:
        other = own_files.read_object(config).get("save")
    except BrokenFileError:
        return None
    if not isinstance(other, str) or storage.is_same(other, save) or not storage.exists(other):
        return None
    return other


def missing_lines_notice(run_dir: str, num_lines: int) -> str | None:
    """Return a sentence if metrics.jsonl has lost lines that a checkpoint counts; else None.

    Args:
        num_lines: of metrics.jsonl when the checkpoint was begun.
    """
    path = storage.join(run_dir, run_folder.METRICS)
    num_there = len(own_files.read_records(path).objects)
    if num_there >= num_lines:
        return None
    return (
        f"{redact(path)} has {num_there} of the {num_lines} lines that the checkpoint continues: "
        "the metrics of the steps before it are not all there. The training is not affected"
    )


def _has_lines(url: str) -> bool:
    """Return whether a file of JSON lines has any, also where they cannot be read."""
    records = own_files.read_records(url)
    return bool(records.objects or records.broken)


def _had_checkpoint(start: dict[str, Any], save: str) -> bool:
    """Return whether a start completed a checkpoint, or went on from one in the same folder."""
    if start.get(FIRST_CHECKPOINT) is not None:
        return True
    origin = str(start.get("checkpoint", ""))
    return start.get("first_step", 0) > 0 and storage.is_within(origin, save)


def _may_be_unnamed(save: str, there: Sequence[int], starts: Sequence[dict[str, Any]]) -> bool:
    """Return whether checkpoints are those of a run that was killed before it named its first one.

    A local one has its name a moment before the tracker names it. In a bucket, files of several may
    lie there that were never complete.
    """
    if len(there) > 1 and storage.is_local(save):
        return False
    is_of_this_version = bool(starts) and all(FIRST_CHECKPOINT in start for start in starts)
    return is_of_this_version and not any(_had_checkpoint(start, save) for start in starts)
