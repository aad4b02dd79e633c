"""What became of every row: trained, held out, or dropped for a reason. The counts reconcile at every step.

    {"chat": {"read": 300, "trained": 268, "truncated": 5, "held_out": 30, "no_messages": 1, "unknown_role": 1}}

    read == trained + held_out + reasons; the truncated ones are among the trained

A step is entered when it was consumed, in step order, and once only. `rejects.jsonl` names each dropped
row, one JSON object a line, and never what it holds:

    {"source": "chat", "file": "s3://…/rows.jsonl", "row": 17, "reason": "no_messages", "detail": "…"}

It is a *set* of rows: one that is in the file is not written again, neither by a second epoch nor by the
steps that a resumed run repeats. Why a row is dropped depends on nothing but the row and settings that the
cursor holds fixed, so a line written after the checkpoint is still true, and nothing has to be taken back.

Dropped rows end the run where they are too large a share of those read, too many one after the other, or of
a reason that is fatal. Each of these errors says what was read and dropped of every source. Rows that are held out
(`row_outcomes.hash_share`) are not dropped: to the limits it is as if they were not there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles.common import json_lines
from miles.data.config import EncodeConfig
from miles.data.files.manifest import Manifest
from miles.data.types import REJECT_REASONS, Reject, StepRows
from miles.errors import CheckpointError, DataError

MIN_ROWS_TO_JUDGE = 1_000
"""Before so many rows were read, a share of bad ones says little."""

_NO_REASON = ("read", "trained", "truncated")
"""Keys of a source's counts that are no reasons."""

FATAL = {
    "too_long": "--too-long error ends the run at the first such row. Shorten or remove it, raise --max-sample-tokens, "
    "or choose --too-long drop or truncate_end"
}
"""Reason -> what the error says where it is fatal."""


def fatal_reasons(config: EncodeConfig) -> frozenset[str]:
    """The reasons of which one row ends the run, by policy."""
    return frozenset({"too_long"} if config.too_long == "error" else ())


@dataclass(frozen=True)
class _Run:
    """Rows that were rejected one after the other."""

    num_rows: int = 0
    first_row_id: int = 0
    last_row_id: int = 0


class Ledger:
    """Counts per source, and the list of rejects."""

    def __init__(
        self,
        manifest: Manifest,
        path: str | None,
        max_bad_fraction: float,
        totals: Mapping[str, Mapping[str, int]] | None = None,
        next_step: int = 0,
        max_bad_rows_in_a_row: int | None = None,
        fatal_reasons: frozenset[str] = frozenset(),
    ) -> None:
        """Begins a ledger, or goes on with one.

        Args:
            manifest: resolves row ids to files.
            path: of `rejects.jsonl` (fsspec URL); None: none is written. Without `totals` it begins empty.
            max_bad_fraction: a larger share of dropped rows ends the run.
            totals: of a cursor, to go on from.
            next_step: the step that is committed next.
            max_bad_rows_in_a_row: so many dropped rows one after the other, in the order in which they are consumed,
                end the run; None: any number may. Counted anew from 0 where a run is resumed.
            fatal_reasons: a row dropped for one of these ends the run.

        Raises:
            CheckpointError: totals of other sources, or that do not reconcile.
        """
        assert fatal_reasons <= set(FATAL), fatal_reasons
        self._manifest, self._path, self._max_bad_fraction = manifest, path, max_bad_fraction
        self._next_step, self._fatal_reasons = next_step, fatal_reasons
        self._max_bad_rows_in_a_row, self._run = max_bad_rows_in_a_row, _Run()
        self._counts: dict[str, dict[str, int]] = {
            name: {"read": 0, "trained": 0} for name in manifest.source_names
        }
        for source, counts in (totals or {}).items():
            self._restore(source, counts)
        self._lines: list[str] = []
        self._listed: set[tuple[str, str, int]] = set()
        if path is not None:
            self._open(path, keep=totals is not None)

    @property
    def num_read(self) -> int:
        return sum(counts["read"] for counts in self._counts.values())

    @property
    def num_held_out(self) -> int:
        return sum(counts.get("held_out", 0) for counts in self._counts.values())

    @property
    def num_rejected(self) -> int:
        return (
            self.num_read
            - self.num_held_out
            - sum(counts["trained"] for counts in self._counts.values())
        )

    @property
    def rejects(self) -> list[dict[str, Any]]:
        """Every row in the list of rejects: `{source, file, row, reason, detail}`."""
        return [json.loads(line) for line in self._lines]

    def totals(self) -> dict[str, dict[str, int]]:
        """source -> {"read": n, "trained": n, "truncated": n, "held_out": n, reason: n, …}, with what occurred;
        JSON-able."""
        return {source: dict(counts) for source, counts in self._counts.items()}

    def epochs(self) -> tuple[float, ...]:
        """How many times each source was read through: over 1 where a mixture repeats it."""
        return tuple(
            self._counts[source.name]["read"] / source.num_rows for source in self._manifest.sources
        )

    def summary(self) -> dict[str, dict[str, Any]]:
        """source -> {"row_shape": …, "columns": {field: column}, "rows": of the source, "epochs": times it was read
        through, "counts": as in `totals`}; JSON-able."""
        return {
            source.name: {
                "row_shape": source.format.shape,
                "columns": dict(source.columns),
                "rows": source.num_rows,
                "epochs": round(epochs, 6),
                "counts": dict(self._counts[source.name]),
            }
            for source, epochs in zip(self._manifest.sources, self.epochs(), strict=True)
        }

    def commit(self, step: int, rows: StepRows) -> None:
        """Enters a consumed step; one that was entered before does nothing. The step is entered whole, and then judged.

        Raises:
            DataError: a row was dropped for a fatal reason, too many were dropped one after the other, or more than the
                allowed share was dropped so far.
        """
        if step < self._next_step:
            return
        assert step == self._next_step, f"step {step} came before step {self._next_step}"
        dropped = {
            (reject.row_id, reject.position) for reject in rows.rejects
        }  # a mixture may take a row twice
        assert len(dropped) == len(rows.rejects), (
            "a row is dropped once for each time that it is read"
        )
        self._next_step += 1
        self._count(rows)
        self._write(rows.rejects)
        longest = self._follow_run(rows)
        for reject in rows.rejects:
            if reject.reason in self._fatal_reasons:
                where = self._where(reject.row_id)
                raise DataError(
                    f"{where}: {reject.reason}, {reject.detail}. {FATAL[reject.reason]}.{self._account()}"
                )
        if (
            self._max_bad_rows_in_a_row is not None
            and longest.num_rows >= self._max_bad_rows_in_a_row
        ):
            raise DataError(
                f"{longest.num_rows} rows in a row were dropped, from {self._where(longest.first_row_id)} to "
                f"{self._where(longest.last_row_id)}; --max-bad-rows-in-a-row ends the run at "
                f"{self._max_bad_rows_in_a_row}. Mend or remove them, or raise the limit.{self._account()}"
            )
        if self.num_read - self.num_held_out >= MIN_ROWS_TO_JUDGE:
            self.judge()

    def judge(self) -> None:
        """Compares the share of dropped rows with the limit; to be called at the end, however few rows there were.

        Raises:
            DataError: more than the allowed share was dropped.
        """
        num_judged = self.num_read - self.num_held_out
        if self.num_rejected <= self._max_bad_fraction * num_judged:
            return
        rows = (
            f"{num_judged} rows read and not held out"
            if self.num_held_out
            else f"{num_judged} rows read"
        )
        raise DataError(
            f"{self.num_rejected} of the {rows} were dropped, more than the share "
            f"{self._max_bad_fraction} that --max-bad-fraction allows. Mend them, or raise the share.{self._account()}"
        )

    def _count(self, rows: StepRows) -> None:
        names = self._manifest.source_names
        for name, num_rows, num_truncated, num_held_out in zip(
            names, rows.read, rows.truncated, rows.held_out, strict=True
        ):
            counts = self._counts[name]
            counts["read"] += num_rows
            counts["trained"] += num_rows - num_held_out
            for key, count in (("truncated", num_truncated), ("held_out", num_held_out)):
                if count:
                    counts[key] = counts.get(key, 0) + count
        for reject in rows.rejects:
            counts = self._counts[names[reject.source_id]]
            counts["trained"] -= 1
            counts[reject.reason] = counts.get(reject.reason, 0) + 1
        assert all(
            counts["trained"] >= counts.get("truncated", 0) for counts in self._counts.values()
        ), "too many"

    def _follow_run(self, rows: StepRows) -> _Run:
        """Follows the rows rejected one after the other through a step; the longest such run that it saw."""
        longest, run, next_position = _Run(), self._run, 0
        for reject in sorted(rows.rejects, key=lambda reject: reject.position):
            goes_on = run.num_rows > 0 and reject.position == next_position
            first = run.first_row_id if goes_on else reject.row_id
            run = _Run(run.num_rows + 1 if goes_on else 1, first, reject.row_id)
            next_position = reject.position + 1
            longest = max(longest, run, key=lambda run: run.num_rows)
        self._run = run if next_position == rows.num_read - rows.num_held_out else _Run()
        return longest

    def _where(self, row_id: int) -> str:
        source, file, row = self._manifest.locate(row_id)
        return f"row {row} (from 0) of {file} (source {source!r})"

    def _account(self) -> str:
        """What was read and dropped so far, of all sources and of each, and where the dropped rows are named."""
        total = Counter[str]()
        for counts in self._counts.values():
            total.update(counts)
        lines = [
            _told("in all", total),
            *(_told(source, counts) for source, counts in self._counts.items()),
        ]
        if self._path is not None:
            lines.append(f"each dropped row is named in {self._path}")
        return "".join(f"\n  {line}" for line in lines)

    def _restore(self, source: str, counts: Mapping[str, int]) -> None:
        if source not in self._counts or not {"read", "trained"} <= set(counts):
            raise CheckpointError(
                f"ledger totals of the checkpoint: source {source!r} is unknown or incomplete"
            )
        num_dropped = sum(count for key, count in counts.items() if key not in _NO_REASON)
        if counts["read"] != counts["trained"] + num_dropped:
            raise CheckpointError(
                f"ledger totals of the checkpoint do not reconcile for {source!r}: {dict(counts)}"
            )
        self._counts[source] = dict(counts)

    def _open(self, path: str, keep: bool) -> None:
        if keep:
            self._lines = json_lines.repair(path)
        else:
            json_lines.write(path, [])
        for entry in self.rejects:
            self._listed.add((entry["source"], entry["file"], entry["row"]))

    def _write(self, rejects: tuple[Reject, ...]) -> None:
        fresh = []
        for reject in rejects:
            source, file, row = self._manifest.locate(reject.row_id)
            if (source, file, row) not in self._listed:
                self._listed.add((source, file, row))
                entry = {"source": source, "file": file, "row": row}
                fresh.append(json.dumps(entry | {"reason": reject.reason, "detail": reject.detail}))
        if fresh and self._path is not None:
            json_lines.append(self._path, fresh, earlier=self._lines)
        self._lines += fresh


def _told(name: str, counts: Mapping[str, int]) -> str:
    """A source's counts as a sentence: chat: 300 rows read, 269 trained (5 truncated), 30 held out, 1 no_messages."""
    truncated = f" ({counts['truncated']} truncated)" if counts.get("truncated") else ""
    reasons = sorted(
        (reason for reason in REJECT_REASONS if counts.get(reason)),
        key=lambda reason: -counts[reason],
    )
    parts = [f"{counts['read']} rows read", f"{counts['trained']} trained{truncated}"]
    parts += [f"{counts['held_out']} held out"] if counts.get("held_out") else []
    return f"{name}: " + ", ".join(parts + [f"{counts[reason]} {reason}" for reason in reasons])
