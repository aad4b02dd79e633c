"""Read the files of a run's folder (fsspec URL). A file that is missing gives an empty result.

Their names are those of `miles.common.run_folder`; docs/metrics.md has the keys of metrics.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miles.common import json_lines, run_folder, storage
from miles.errors import SourceError

Metrics = Mapping[str, Any]
"""One line of metrics.jsonl."""

MAX_SKIPPED_STEPS = 20
MAX_STARTS = 20
MAX_ANSWERS = 4
_ROWS_OF_A_STEP = 3


@dataclass(frozen=True)
class FirstBatch:
    """The samples of a run's first step."""

    tokenizer: str
    """name or folder of the tokenizer"""
    samples: tuple[Mapping[str, Any], ...]
    """`source`, `file`, `row`, and of each token `input_ids` and `loss_mask`"""


def read_metrics(folder: str) -> list[Metrics]:
    """Return the lines of metrics.jsonl.

    Raises:
        SourceError: the file is missing or empty.
    """
    path = storage.join(folder, run_folder.METRICS)
    if not storage.exists(path):
        raise SourceError(
            f"{path}: no such file; expected the folder of a run (--output-dir, or --save)"
        )
    lines: list[Metrics] = [*json_lines.read(path)]
    if not lines:
        raise SourceError(f"{path}: no step was trained yet")
    return lines


def read_rejects(folders: Sequence[str]) -> list[dict[str, Any]]:
    """Return every dropped row of the folders, of a run or of `miles prepare`."""
    rejects: list[dict[str, Any]] = []
    for folder in folders:
        rejects += json_lines.read(storage.join(folder, run_folder.REJECTS))
    return rejects


def read_ledger(folder: str) -> dict[str, dict[str, Any]]:
    """Return the ledger of a run: for each source what `Ledger.summary` gives."""
    path = storage.join(folder, run_folder.LEDGER)
    if not storage.exists(path):
        return {}
    ledger: dict[str, dict[str, Any]] = json.loads(storage.read_text(path))
    return ledger


def read_prepared_ledgers(folders: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the ledgers of folders that `miles prepare` wrote, in one mapping by source."""
    sources: dict[str, dict[str, Any]] = {}
    for folder in folders:
        summary = json.loads(storage.read_text(storage.join(folder, run_folder.SUMMARY)))
        sources.update(summary["ledger"])
    return sources


def read_answers(folder: str) -> list[dict[str, Any]]:
    """Return the first answers of the last evaluation (`--eval-samples`)."""
    answers = json_lines.read(storage.join(folder, run_folder.EVAL_SAMPLES))
    latest = [answer for answer in answers if answer["step"] == answers[-1]["step"]]
    return latest[:MAX_ANSWERS]


def read_skipped_steps(folder: str) -> list[dict[str, str]]:
    """Return the last steps that were skipped because a number was not finite.

    Each has its `step`, its `reason`, and a few of its `rows`, one a line.
    """
    entries = json_lines.read(storage.join(folder, run_folder.SKIPPED_STEPS))

    steps = []
    for entry in entries[-MAX_SKIPPED_STEPS:]:
        rows = [f"row {row['row']} of {row['file']}" for row in entry["rows"][:_ROWS_OF_A_STEP]]
        num_more = len(entry["rows"]) - len(rows)
        if num_more:
            rows.append(f"and {num_more} more")
        steps.append(
            {"step": str(entry["step"]), "reason": entry["reason"], "rows": "\n".join(rows)}
        )
    return steps


def read_starts(folder: str) -> list[dict[str, str]]:
    """Return the last starts of a run and how each ended. Empty for a run with one start only."""
    entries = json_lines.read(storage.join(folder, run_folder.ATTEMPTS))
    starts = [entry for entry in entries if "start" in entry]
    ends = {entry["end"]: entry["how"] for entry in entries if "end" in entry}
    if len(starts) < 2:
        return []

    # A start without an end was killed, unless it is the newest, which may be running.
    newest = starts[-1]["start"]
    return [
        {
            "time": entry["time"],
            "step": f"{entry['first_step']:,}",
            "ranks": str(entry["world_size"]),
            "reason": entry["reason"],
            "end": ends.get(entry["start"], "" if entry["start"] == newest else "killed"),
        }
        for entry in starts[-MAX_STARTS:]
    ]


def read_first_batch(folder: str) -> FirstBatch | None:
    """Return the samples of the first step; None where the run kept none."""
    path = storage.join(folder, run_folder.FIRST_BATCH)
    if not storage.exists(path):
        return None
    content = json.loads(storage.read_text(path))
    samples: list[Mapping[str, Any]] = []
    for micro_batch in content["micro_batches"]:
        samples += micro_batch
    return FirstBatch(content["tokenizer"], tuple(samples))
