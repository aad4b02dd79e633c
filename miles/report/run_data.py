"""Read the files of a run's folder (fsspec URL). A file that is missing gives an empty result.

A broken one raises a `BrokenFileError`. Of a file of JSON lines, the readable lines are returned,
and `notify` is told of the others. The names of the files are those of `miles.common.run_folder`;
docs/metrics.md has the keys of metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miles.common import own_files, run_folder, storage
from miles.common.near_names import meant_path
from miles.common.own_files import Form
from miles.errors import BrokenFileError, MissingFileError, SourceError

Metrics = Mapping[str, Any]
"""One line of metrics.jsonl."""
Notify = Callable[[str], None]
"""A function that is told, in a sentence, what cannot be read."""

_METRICS_FORM = ("step", "sft/loss", "sft/epoch")

MAX_SKIPPED_STEPS = 20
MAX_STARTS = 20
MAX_ANSWERS = 4
MAX_EARLIER_ANSWERS = 10
"""To each prompt."""
MAX_CHARACTERS = 6_000
"""The limit of a prompt or an answer."""
_ROWS_OF_A_STEP = 3
_OF_A_SAMPLE = ("source", "file", "row", "input_ids", "loss_mask")


@dataclass(frozen=True)
class FirstBatch:
    """The samples of a run's first step."""

    tokenizer: str
    """name or folder of the tokenizer"""
    samples: tuple[Mapping[str, Any], ...]
    """`source`, `file`, `row`, and of each token `input_ids` and `loss_mask`"""


def read_metrics(folder: str, notify: Notify = print) -> list[Metrics]:
    """Return the lines of metrics.jsonl.

    Raises:
        SourceError: the file is missing or empty, or no line of it can be read.
    """
    path = storage.join(folder, run_folder.METRICS)
    if not storage.exists(path):
        raise SourceError(
            f"{path}: no such file; expected the folder of a run (--output-dir, or --save)"
            f"{meant_path(folder)}"
        )
    lines: list[Metrics] = [*_read_lines(path, notify, _METRICS_FORM)]
    if not lines and own_files.read_records(path).broken:
        raise BrokenFileError(f"{path}: no line of it can be read")
    if not lines:
        raise SourceError(f"{path}: no step was trained yet")
    return lines


def _read_lines(path: str, notify: Notify, *forms: Form) -> list[dict[str, Any]]:
    """Return the readable lines of a file; tell of the others.

    Args:
        forms: the keys that a line must have; of several forms, one of them.
    """
    records = own_files.read_records(path, forms)
    if records.broken:
        notify(f"{path}: {records.broken_text} cannot be read, and not shown here.")
    if records.is_cut_off:
        notify(f"{path}: its last line was cut off, and is not shown here.")
    return list(records.objects)


def read_rejects(folders: Sequence[str], notify: Notify = print) -> list[dict[str, Any]]:
    """Return every dropped row of the folders, of a run or of `miles prepare`."""
    rejects: list[dict[str, Any]] = []
    for folder in folders:
        path = storage.join(folder, run_folder.REJECTS)
        rejects += _read_lines(path, notify, ("file", "row", "reason"))
    return rejects


def read_ledger(folder: str) -> dict[str, dict[str, Any]]:
    """Return the ledger of a run: for each source what `Ledger.summary` gives.

    Raises:
        BrokenFileError: the file is not that of a ledger.
    """
    path = storage.join(folder, run_folder.LEDGER)
    try:
        return _require_ledger(own_files.read_object(path), path)
    except MissingFileError:
        return {}


def read_prepared_ledgers(folders: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the ledgers of folders that `miles prepare` wrote, in one mapping by source.

    Raises:
        BrokenFileError: a file is not that of a prepared folder.
    """
    sources: dict[str, dict[str, Any]] = {}
    for folder in folders:
        path = storage.join(folder, run_folder.SUMMARY)
        sources.update(_require_ledger(own_files.read_object(path, "ledger")["ledger"], path))
    return sources


def _require_ledger(ledger: Any, path: str) -> dict[str, dict[str, Any]]:
    """Check that each source of a ledger has its numbers."""
    try:
        for entry in ledger.values():
            numbers = [entry["rows"], entry["epochs"], *entry["counts"].values()]
            has_all = {"read", "trained"} <= entry["counts"].keys() and "row_shape" in entry
            if not has_all or not all(isinstance(number, int | float) for number in numbers):
                raise KeyError
    except (AttributeError, KeyError, TypeError) as error:
        raise BrokenFileError(f"{path}: not a ledger that this version can read") from error
    return dict(ledger)


def read_answers(folder: str, notify: Notify = print) -> list[dict[str, Any]]:
    """Return the first answers of the last evaluation (`--eval-samples`).

    Each has in `earlier` the answers to the same prompt after earlier steps: `step`, `answer`,
    `ended`. Of many, some are returned, evenly spread.
    """
    path = storage.join(folder, run_folder.EVAL_SAMPLES)
    form = ("step", "source", "row", "prompt", "answer", "expected", "ended")
    answers = _read_lines(path, notify, form)
    latest = [answer for answer in answers if answer["step"] == answers[-1]["step"]]

    shown = []
    for answer in latest[:MAX_ANSWERS]:
        earlier = [each for each in answers if _is_same_row(each, answer)]
        earlier = [each for each in earlier if each["step"] != answer["step"]]
        stride = -(-len(earlier) // MAX_EARLIER_ANSWERS) or 1
        spread = [_cut(each, "answer") for each in earlier[::-stride]]
        shown.append(_cut(answer, "prompt", "answer", "expected") | {"earlier": spread})
    return shown


def _is_same_row(answer: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(answer.get(key) == other.get(key) for key in ("source", "file", "row"))


def _cut(answer: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return an answer whose long texts are cut, with a sign that they are."""
    cut = dict(answer)
    for name in names:
        text = str(answer[name])
        cut[name] = text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} [cut here]"
    return cut


def read_skipped_steps(folder: str, notify: Notify = print) -> list[dict[str, str]]:
    """Return the last steps that were skipped because a number was not finite.

    Each has its `step`, its `reason`, and a few of its `rows`, one a line.
    """
    path = storage.join(folder, run_folder.SKIPPED_STEPS)
    entries = _read_lines(path, notify, ("step", "reason", "rows"))

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


def read_settings(folder: str) -> dict[str, Any]:
    """Return the settings of a run; none where they were not kept.

    Raises:
        BrokenFileError: they cannot be read.
    """
    try:
        return own_files.read_object(storage.join(folder, run_folder.CONFIG))
    except MissingFileError:
        return {}


def read_training(folder: str) -> str:
    """Return what is trained where that is not all weights; "" where it is, or is not known.

    Raises:
        BrokenFileError: the run's settings cannot be read.
    """
    lora = read_settings(folder).get("lora") or {}
    if not lora.get("rank"):
        return ""
    targets = ", ".join(lora["target_modules"])
    without = f" without {', '.join(lora['exclude_modules'])}" if lora["exclude_modules"] else ""
    return f"LoRA of rank {lora['rank']}, alpha {lora['alpha']:g}, on {targets}{without}"


def read_attempts(folder: str, notify: Notify = print) -> list[dict[str, Any]]:
    """Return the entries of starts.jsonl: starts, and how they ended."""
    path = storage.join(folder, run_folder.ATTEMPTS)
    start = ("start", "time", "first_step", "world_size", "reason")
    return _read_lines(path, notify, start, ("end", "how"), ("not_begun",))


def starts_and_ends(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the last starts of a run and how each ended. Empty for a run with one start only."""
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
    """Return the samples of the first step; None where the run kept none.

    Raises:
        BrokenFileError: the file is not that of a first batch.
    """
    path = storage.join(folder, run_folder.FIRST_BATCH)
    try:
        content = own_files.read_object(path, "tokenizer", "micro_batches")
    except MissingFileError:
        return None

    try:
        samples: list[Mapping[str, Any]] = []
        for micro_batch in content["micro_batches"]:
            samples += [{key: sample[key] for key in _OF_A_SAMPLE} for sample in micro_batch]
        has_masks = all(len(sample["input_ids"]) == len(sample["loss_mask"]) for sample in samples)
    except (KeyError, TypeError) as error:
        raise BrokenFileError(
            f"{path}: not a first batch that this version can read ({error})"
        ) from error

    if not samples or not has_masks:
        raise BrokenFileError(f"{path}: not a first batch that this version can read")
    return FirstBatch(str(content["tokenizer"]), tuple(samples))
