"""Telling from its folder that a run is finished: without Ray, without torch, without its rows.

A run is finished for this launch line if its last attempt ended with the last step, the tracker
names the checkpoint of that step, which is complete, the settings that make its length are those
that it was started with, and what follows the last step is there: the ledger, the metrics, the
export. Anything else is left to the run itself, which finds out what is missing, and does it or
names it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from miles.common import checkpoint_folder, json_lines, own_files, run_folder, storage
from miles.common.checkpoint_folder import SavedCheckpoint
from miles.common.counts import counted
from miles.common.run_record import missing_lines_notice
from miles.errors import MilesError
from miles.train.config import TrainConfig
from miles.train.driver.resolved_settings import describe
from miles.train.export_target import is_exported

LAST_STEP = "the last step"
"""The end of an attempt that left nothing to do, in starts.jsonl."""

_SETTINGS = ("data", "num_rollout", "hf_checkpoint", "ref_load", "load", "lora")
"""Settings that say which steps a run has, and what they train."""


def report_if_finished(config: TrainConfig, report: Callable[[str], None]) -> bool:
    """Say that a run is finished, if its folder tells; False: ask the run."""
    try:
        checkpoint = _finished_checkpoint(config)
    # What is missing, cut off or not to be reached is the run's to report.
    except (MilesError, OSError, ValueError, LookupError, TypeError):
        return False
    if checkpoint is None:
        return False
    report(finished_text(checkpoint.iteration, checkpoint.iteration, checkpoint.url))
    return True


def finished_text(num_done: int, num_steps: int, url: str) -> str:
    """Return the sentence on a finished run."""
    if num_done > num_steps:
        return (
            f"this run is finished: it has {counted(num_done, 'step')}, more than the {num_steps} that are "
            f"asked for; they are in {url}"
        )
    return f"this run is finished: {num_done:,} of {counted(num_steps, 'step')} are in {url}"


def _finished_checkpoint(config: TrainConfig) -> SavedCheckpoint | None:
    """Return the last checkpoint of a finished run; None where something is left."""
    end = json_lines.read(storage.join(config.run_dir, run_folder.ATTEMPTS))[-1]
    checkpoint = checkpoint_folder.find(config.save)
    if end["how"] != LAST_STEP or checkpoint is None or checkpoint.iteration != end["next_step"]:
        return None
    if not checkpoint.extra or checkpoint.extra.get("unwritten_metrics"):
        return None

    is_finished = _has_these_settings(config) and _has_results(config, checkpoint)
    return checkpoint if is_finished else None


def _has_results(config: TrainConfig, checkpoint: SavedCheckpoint) -> bool:
    """Return whether what follows the last step is there: ledger, metrics, export.

    Raises:
        SourceError: the ledger is missing or broken.
    """
    own_files.read_object(storage.join(config.run_dir, run_folder.LEDGER))
    if not is_exported(config.save_hf, checkpoint.iteration, is_adapter=config.lora.is_on):
        return False
    num_lines = (checkpoint.extra or {})["metrics_lines"]
    return missing_lines_notice(config.run_dir, num_lines) is None


def _has_these_settings(config: TrainConfig) -> bool:
    """Return whether the last start had the settings of this one that say which steps there are."""
    text = storage.read_text(storage.join(config.run_dir, run_folder.CONFIG))
    before: dict[str, Any] = json.loads(text)
    before = _with_defaults(before, config)
    now = json.loads(describe(config))
    return all(before[name] == now[name] for name in _SETTINGS)


def _with_defaults(before: Any, now: Any) -> Any:
    """Return settings that an older version wrote, with the defaults of fields that came later.

    Args:
        before: from JSON.
        now: the records that follow from them.
    """
    if isinstance(before, list) and isinstance(now, tuple) and len(before) == len(now):
        return [_with_defaults(old, new) for old, new in zip(before, now, strict=True)]
    if not isinstance(before, dict) or not dataclasses.is_dataclass(now):
        return before

    filled = dict(before)
    for field in dataclasses.fields(now):
        if field.name in before:
            filled[field.name] = _with_defaults(before[field.name], getattr(now, field.name))
        elif field.default is not dataclasses.MISSING:
            default = field.default
            is_record = dataclasses.is_dataclass(default) and not isinstance(default, type)
            filled[field.name] = dataclasses.asdict(default) if is_record else default
    return json.loads(json.dumps(filled, default=str))
