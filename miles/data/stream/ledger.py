"""The ledger: what became of every row, trained, held out, or dropped for a reason.

    {"chat": {"read": 300, "trained": 268, "truncated": 5, "held_out": 30, "no_messages": 2}}

    read == trained + held_out + reasons; the truncated rows are among the trained

Beside them stand the keys of messages that nothing reads, with the rows that have each.

The counts reconcile at every step. A step is entered when it was consumed, in step order, and
once only. `rejects.jsonl` names each dropped row, one JSON object a line, and never what it holds:

    {"source": "chat", "file": "s3://…/a.jsonl", "row": 17, "reason": "no_messages", "detail": ""}

The file is a *set* of rows: a row that is in it is not written again, neither by a second epoch nor
by the steps that a resumed run repeats. The reason of a drop depends only on the row and on
settings that the cursor holds fixed. So a line that was written after the checkpoint is still true
when the run resumes, and nothing has to be taken back.

Dropped rows end the run at the limits of `RejectLimits`. Each of these errors says what was read
and dropped of every source. Held-out rows (`row_outcomes.hash_share`) are not dropped: for the
limits, it is as if they were not there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from miles.common.counts import counted
from miles.common.patient_file import PatientFile, Report
from miles.data.files.manifest import Manifest
from miles.data.reasons import LEFT_OUT_BY_TRANSFORM
from miles.data.stream.account import advice, not_used, reasons_of, sentence, total
from miles.data.stream.reject_limits import FATAL_ADVICE, LENGTH_FLAGS, RejectLimits, Streak
from miles.data.types import Reject, StepRows
from miles.data.unused_names import add_count
from miles.errors import CheckpointError, DataError

MIN_ROWS_TO_JUDGE = 1_000
"""Before as many rows were read, the share of dropped ones says little."""

_NO_REASON = ("read", "trained", "truncated")
"""Keys of a source's counts that are no reasons."""


class Ledger:
    """The counts of each source, and the list of rejects."""

    def __init__(
        self,
        manifest: Manifest,
        path: str | None,
        limits: RejectLimits,
        totals: Mapping[str, Mapping[str, int]] | None = None,
        next_step: int = 0,
        report: Report = print,
        *,
        unused_keys: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        """Begin a ledger, or continue one.

        Args:
            manifest: resolves row ids to files.
            path: of `rejects.jsonl` (fsspec URL); None: none is written. Without `totals` the file
                begins empty.
            limits: of rejected rows. A streak of them begins anew in a resumed run.
            totals: of a cursor, to continue from.
            next_step: the step that is committed next.
            report: is told if the file cannot be written; the run goes on.
            unused_keys: of a cursor, to continue from.

        Raises:
            CheckpointError: totals of other sources, or that do not reconcile.
        """
        self._manifest = manifest
        self._path = path
        self._limits = limits
        self._streak = Streak()
        self._next_step = next_step

        self._counts: dict[str, dict[str, int]] = {
            name: {"read": 0, "trained": 0} for name in manifest.source_names
        }
        for source, counts in (totals or {}).items():
            self._restore(source, counts)
        self._unused_keys: dict[str, dict[str, int]] = {}
        for source, by_key in (unused_keys or {}).items():
            self._restore_keys(source, by_key)
        self._listed: set[tuple[str, str, int]] = set()
        self._lines: list[str] = []
        self._file: PatientFile | None = None
        if path is not None:
            self._file = PatientFile.read(path, report)
            self._open(self._file, keep=totals is not None)

    @property
    def num_read(self) -> int:
        """Rows read so far."""
        return sum(counts["read"] for counts in self._counts.values())

    @property
    def num_held_out(self) -> int:
        """Rows held out so far."""
        return sum(counts.get("held_out", 0) for counts in self._counts.values())

    @property
    def num_rejected(self) -> int:
        """Rows dropped so far."""
        num_trained = sum(counts["trained"] for counts in self._counts.values())
        return self.num_read - self.num_held_out - num_trained

    @property
    def _num_left_out(self) -> int:
        """Rows that the user's function left out so far. They are dropped, and not bad."""
        return sum(counts.get(LEFT_OUT_BY_TRANSFORM, 0) for counts in self._counts.values())

    @property
    def rejects(self) -> list[dict[str, Any]]:
        """Every row in the list of rejects: `{source, file, row, reason, detail}`."""
        return [json.loads(line) for line in self._lines]

    def totals(self) -> dict[str, dict[str, int]]:
        """Return the counts of each source, those that are not 0; JSON-able.

        Returns:
            source -> {"read": n, "trained": n, "truncated": n, "held_out": n, reason: n, …}
        """
        return {source: dict(counts) for source, counts in self._counts.items()}

    def unused_keys(self) -> dict[str, dict[str, int]]:
        """Return the keys of messages that nothing reads; JSON-able.

        Returns:
            source -> {key: rows that have it}; only sources with such keys
        """
        return {source: dict(counts) for source, counts in self._unused_keys.items()}

    def epochs(self) -> tuple[float, ...]:
        """Return how many times each source was read: over 1 where a mixture repeats it."""
        return tuple(
            self._counts[source.name]["read"] / source.num_rows for source in self._manifest.sources
        )

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return what the rows of each source look like, and what became of them; JSON-able.

        Returns:
            source -> {"row_shape": …, "columns": {field: column}, "rows": of the source,
            "epochs": how many times it was read, "counts": as in `totals`, and what
            `account.not_used` has of it}
        """
        return {
            source.name: {
                "row_shape": source.format.shape,
                "columns": dict(source.columns),
                "rows": source.num_rows,
                "epochs": round(epochs, 6),
                "counts": _in_order(self._counts[source.name]),
                **not_used(source, self._unused_keys.get(source.name, {})),
            }
            for source, epochs in zip(self._manifest.sources, self.epochs(), strict=True)
        }

    def commit(self, step: int, rows: StepRows) -> None:
        """Enter a consumed step, and then judge its rejects. A step that was entered is ignored.

        Raises:
            DataError: a row was dropped for a fatal reason, too many were dropped in a row, or more
                than the allowed share was dropped so far.
        """
        if step < self._next_step:
            return
        assert step == self._next_step, f"step {step} came before step {self._next_step}"
        # A mixture may take a row twice, at two positions.
        dropped = {(reject.row_id, reject.position) for reject in rows.rejects}
        assert len(dropped) == len(rows.rejects), "a row is dropped once each time it is read"

        self._next_step += 1
        self._count(rows)
        self._write(rows.rejects)
        longest, self._streak = self._streak.through(rows)

        for reject in self._limits.fatal(rows.rejects):
            raise DataError(
                f"{self._where(reject.row_id)}: {reject.reason}, {reject.detail}. "
                f"{FATAL_ADVICE[reject.reason]}.{self._account()}"
            )
        max_in_a_row = self._limits.max_bad_rows_in_a_row
        if max_in_a_row is not None and longest.num_rows >= max_in_a_row:
            raise DataError(
                f"{longest.num_rows:,} rows in a row were dropped, from "
                f"{self._where(longest.first_row_id)} to {self._where(longest.last_row_id)}; "
                f"--max-bad-rows-in-a-row ends the run at {max_in_a_row}.{self._advice()} Mend or "
                f"remove them, or raise the limit.{self._account()}"
            )
        if self.num_read - self.num_held_out >= MIN_ROWS_TO_JUDGE:
            self.judge()

    def flush(self) -> None:
        """Write the list of rejects if it is remote; a local one has each line at once."""
        if self._file is not None:
            self._file.flush()

    def require_written(self) -> None:
        """Make sure that the list of rejects is complete.

        Raises:
            WriteError: it could not be written.
        """
        if self._file is not None:
            self._file.require_written()

    def close(self) -> None:
        """Write the list of rejects, and report what it lacks."""
        if self._file is not None:
            self._file.close()

    def judge(self) -> None:
        """Compare the share of dropped rows with the limit, however few rows there were.

        Call it at the end of a run.

        Raises:
            DataError: more than the allowed share was dropped.
        """
        num_rows = self.num_read - self.num_held_out
        num_bad = self.num_rejected - self._num_left_out
        if self._limits.is_share_exceeded(num_bad, num_rows):
            rows = f"{counted(num_rows, 'row')} read" + (
                " and not held out" if self.num_held_out else ""
            )
            raise self._limits.share_error(
                num_bad, rows, advice=self._advice(), account=self._account()
            )

    def require_trained(self) -> None:
        """Refuse to end without a row that was trained.

        Raises:
            DataError: all rows that were read were dropped or held out.
        """
        if self.num_read and not any(counts["trained"] for counts in self._counts.values()):
            raise DataError(
                f"none of the {self.num_read:,} rows read can be used: nothing was trained. See "
                f"--row-shape, {LENGTH_FLAGS} and --eval-fraction.{self._advice()}{self._account()}"
            )

    def _count(self, rows: StepRows) -> None:
        """Add a step to the counts of its sources."""
        names = self._manifest.source_names
        by_source = zip(names, rows.read, rows.truncated, rows.held_out, strict=True)
        for name, num_read, num_truncated, num_held_out in by_source:
            counts = self._counts[name]
            counts["read"] += num_read
            counts["trained"] += num_read - num_held_out
            for key, count in (("truncated", num_truncated), ("held_out", num_held_out)):
                if count:
                    counts[key] = counts.get(key, 0) + count

        for reject in rows.rejects:
            counts = self._counts[names[reject.source_id]]
            counts["trained"] -= 1
            counts[reject.reason] = counts.get(reject.reason, 0) + 1

        for key_count in rows.unused_keys:
            by_key = self._unused_keys.setdefault(names[key_count.source_id], {})
            add_count(by_key, key_count.key, key_count.num_rows)

        for counts in self._counts.values():
            assert counts["trained"] >= counts.get("truncated", 0), "more truncated than trained"

    def _where(self, row_id: int) -> str:
        """Name a row in an error."""
        source, file, row = self._manifest.locate(row_id)
        return f"row {row} (from 0) of {file} (source {source!r})"

    def _advice(self) -> str:
        """Say what to do about the most frequent reason, with the first row of it."""
        counts = total(self._counts.values())
        reason = next(iter(reasons_of(counts)), None)
        for reject in self.rejects:
            if reject["reason"] == reason:
                where = f"row {reject['row']} (from 0) of {reject['file']}"
                return advice(counts, f"{where}, {reject['detail']}")
        return advice(counts)

    def _account(self) -> str:
        """Say what was read and dropped so far, of all sources and of each.

        Begins on a new line. Ends with where the dropped rows are named.
        """
        lines = [sentence("in all", total(self._counts.values()))]
        lines += [sentence(source, counts) for source, counts in self._counts.items()]
        if self._path is not None:
            lines.append(f"each dropped row is named in {self._path}")
        return "".join(f"\n  {line}" for line in lines)

    def _restore(self, source: str, counts: Mapping[str, int]) -> None:
        """Take over the counts of a source from a checkpoint."""
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

    def _restore_keys(self, source: str, by_key: Mapping[str, int]) -> None:
        """Take over the counts of a source's keys from a checkpoint."""
        if source not in self._counts or not isinstance(by_key, Mapping):
            raise CheckpointError(
                f"unused keys of the checkpoint: source {source!r} is unknown, or has no counts"
            )
        self._unused_keys[source] = dict(by_key)

    def _open(self, file: PatientFile, keep: bool) -> None:
        """Open the list of rejects: what is in it stays, or it begins empty."""
        if not keep:
            file.replace([])
        self._lines = file.lines
        for entry in self.rejects:
            self._listed.add((entry["source"], entry["file"], entry["row"]))

    def _write(self, rejects: tuple[Reject, ...]) -> None:
        """Add the rejects that are not in the list yet."""
        fresh = []
        for reject in rejects:
            if reject.reason == LEFT_OUT_BY_TRANSFORM:  # counted; there may be millions
                continue
            source, file, row = self._manifest.locate(reject.row_id)
            if (source, file, row) not in self._listed:
                self._listed.add((source, file, row))
                entry = {"source": source, "file": file, "row": row}
                fresh.append(json.dumps(entry | {"reason": reject.reason, "detail": reject.detail}))
        if self._file is None:
            self._lines += fresh
        elif fresh:
            self._file.add(*fresh)


def _in_order(counts: Mapping[str, int]) -> dict[str, int]:
    """Return counts in one order, whatever a resume has restored first."""
    first = {
        key: counts[key] for key in ("read", "trained", "truncated", "held_out") if key in counts
    }
    return first | {reason: counts[reason] for reason in sorted(counts) if reason not in first}
