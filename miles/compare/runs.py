"""A run as its folder tells: its settings, its steps, and the place of its checkpoint in the data.

    config.json    ->  settings, flattened: "optimizer.lr" -> 1e-5
    metrics.jsonl  ->  of each step: fingerprint, loss, tokens so far
    miles.json     ->  of the newest checkpoint: fingerprints of the files and of the encoder, seed, …

What is missing is None, never a guess.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from miles.common import checkpoint_folder, own_files, run_folder, storage
from miles.errors import MilesError, SourceError
from miles.report.run_data import read_metrics

FINGERPRINT = "data/step_fingerprint"
LOSS = "sft/loss"
TOKENS = "sft/tokens_seen"
CURSOR = ("manifest_fingerprint", "encoder_fingerprint", "seed", "batch_size", "shuffle")
"""The entries of a checkpoint's cursor that decide the rows of each step, and their tokens."""


@dataclass(frozen=True)
class Step:
    """One step of a run."""

    loss: float | None
    """mean over the trained tokens; None where it is no number"""
    tokens_seen: int | None
    """trained tokens up to and with this step"""
    fingerprint: str | None
    """of its samples"""


@dataclass(frozen=True)
class Run:
    """A run, as its folder tells of it."""

    folder: str
    steps: Mapping[int, Step]
    """by number, from 0"""
    settings: Mapping[str, Any] | None
    """dotted name -> value; None: there is no config.json"""
    cursor: Mapping[str, Any] = field(default_factory=dict)
    """those of `CURSOR` that its newest checkpoint has"""

    @property
    def last_step(self) -> int:
        return max(self.steps)


def read_run(folder: str, notify: Callable[[str], None]) -> Run:
    """Read a run's folder.

    Args:
        folder: `--output-dir`, or `--save` (fsspec URL).
        notify: is told, in a sentence, what cannot be read.

    Raises:
        SourceError: there is no run, or it has no step yet.
    """
    if storage.exists(folder) and not storage.is_folder(folder):
        raise SourceError(f"{folder}: a file, not a folder; expected the folder of a run")
    steps = {}
    for line in read_metrics(folder, notify):
        number = line["step"]
        if isinstance(number, int):
            steps[number] = Step(
                _number(line.get(LOSS)), _whole(line.get(TOKENS)), _text(line.get(FINGERPRINT))
            )
    if not steps:
        raise SourceError(f"{folder}: no step of {run_folder.METRICS} can be read")

    settings = None
    try:
        settings = own_files.read_object(storage.join(folder, run_folder.CONFIG))
    except SourceError as error:
        notify(f"{error}; its settings cannot be compared")
    flat = None if settings is None else flattened(settings)
    save = (settings or {}).get("save") or folder
    return Run(folder, steps, flat, _cursor_in(str(save)))


def _cursor_in(save: str) -> dict[str, Any]:
    """Return what the newest checkpoint says of its data; nothing where there is none."""
    with contextlib.suppress(MilesError, AttributeError):
        found = checkpoint_folder.find(save, weights_only=True)
        cursor = ((found.extra if found else None) or {}).get("cursor") or {}
        return {name: cursor[name] for name in CURSOR if name in cursor}
    return {}


def flattened(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return settings by dotted names; lists and empty mappings stay whole."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{before}{name}.")
        else:
            flat[f"{before}{name}"] = value
    return flat


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
