"""What became of every row: trained, or dropped for a reason. The counts reconcile at every step.

    {"chat": {"read": 300, "trained": 298, "no_messages": 1, "unknown_role": 1}}   read == trained + reasons

A step is entered when it was consumed, in step order, and once only. `rejects.jsonl` names each dropped
row, one JSON object a line:

    {"source": "chat", "file": "s3://…/rows.jsonl", "row": 17, "reason": "no_messages", "detail": "…"}

It is a *set* of rows: one that is in the file is not written again, neither by a second epoch nor by the
steps that a resumed run repeats. Why a row is dropped depends on nothing but the row and settings that the
cursor holds fixed, so a line written after the checkpoint is still true, and nothing has to be taken back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miles import storage
from miles.data.manifest import Manifest
from miles.data.types import REJECT_REASONS, Reject, StepReport
from miles.errors import CheckpointError, DataError

MIN_ROWS_TO_JUDGE = 1_000
"""Before so many rows were read, a share of bad ones says little."""


class Ledger:
    """Counts per source, and the list of rejects."""

    def __init__(
        self,
        manifest: Manifest,
        path: str | None,
        max_bad_fraction: float,
        totals: Mapping[str, Mapping[str, int]] | None = None,
        next_step: int = 0,
    ) -> None:
        """Begins a ledger, or goes on with one.

        Args:
            manifest: resolves row ids to files.
            path: of `rejects.jsonl` (fsspec URL); None: none is written. Without `totals` it begins empty.
            max_bad_fraction: a larger share of dropped rows ends the run.
            totals: of a cursor, to go on from.
            next_step: the step that is committed next.

        Raises:
            CheckpointError: totals of other sources, or that do not reconcile.
        """
        self._manifest, self._path, self._max_bad_fraction = manifest, path, max_bad_fraction
        self._next_step = next_step
        self._counts: dict[str, dict[str, int]] = {name: {"read": 0, "trained": 0} for name in manifest.source_names}
        for source, counts in (totals or {}).items():
            self._restore(source, counts)
        self._lines: list[str] = []
        self._listed: set[tuple[str, int]] = set()
        if path is not None:
            self._open(path, keep=totals is not None)

    @classmethod
    def from_totals(
        cls,
        totals: Mapping[str, Mapping[str, int]],
        manifest: Manifest,
        path: str | None,
        max_bad_fraction: float,
        next_step: int,
    ) -> Ledger:
        """The ledger as it stood when `totals()` gave these, to go on with step `next_step`."""
        return cls(manifest, path, max_bad_fraction, totals, next_step)

    @property
    def num_read(self) -> int:
        return sum(counts["read"] for counts in self._counts.values())

    @property
    def num_rejected(self) -> int:
        return self.num_read - sum(counts["trained"] for counts in self._counts.values())

    @property
    def rejects(self) -> list[dict[str, Any]]:
        """Every row in the list of rejects: `{source, file, row, reason, detail}`."""
        return [json.loads(line) for line in self._lines]

    def totals(self) -> dict[str, dict[str, int]]:
        """source -> {"read": n, "trained": n, reason: n, …}, with the reasons that occurred; JSON-able."""
        return {source: dict(counts) for source, counts in self._counts.items()}

    def commit(self, report: StepReport) -> None:
        """Enters a consumed step; one that was entered before does nothing.

        Raises:
            DataError: more than the allowed share of rows was dropped so far.
        """
        if report.index < self._next_step:
            return
        assert report.index == self._next_step, f"step {report.index} came before step {self._next_step}"
        assert sum(report.source_rows) == report.num_rows, "a step's rows are those of its sources"
        assert len({reject.row_id for reject in report.rejects}) == len(report.rejects), "a row is dropped once"
        self._next_step += 1
        names = self._manifest.source_names
        for name, num_rows in zip(names, report.source_rows, strict=True):
            self._counts[name]["read"] += num_rows
            self._counts[name]["trained"] += num_rows
        for reject in report.rejects:
            counts = self._counts[names[reject.source_id]]
            counts["trained"] -= 1
            counts[reject.reason] = counts.get(reject.reason, 0) + 1
        assert all(counts["trained"] >= 0 for counts in self._counts.values()), "more rejects than rows"
        self._write(report.rejects)
        if self.num_read >= MIN_ROWS_TO_JUDGE:
            self.judge()

    def judge(self) -> None:
        """Compares the share of dropped rows with the limit; to be called at the end, however few rows there were.

        Raises:
            DataError: more than the allowed share was dropped.
        """
        if self.num_rejected <= self._max_bad_fraction * self.num_read:
            return
        reasons = {reason: sum(c.get(reason, 0) for c in self._counts.values()) for reason in REJECT_REASONS}
        listed = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items(), key=lambda r: -r[1]) if n)
        where = f" Each is named in {self._path}." if self._path else ""
        raise DataError(
            f"{self.num_rejected} of the {self.num_read} rows read were dropped ({listed}), more than the share "
            f"{self._max_bad_fraction} that --max-bad-fraction allows.{where} Mend them, or raise the share"
        )

    def _restore(self, source: str, counts: Mapping[str, int]) -> None:
        if source not in self._counts or not {"read", "trained"} <= set(counts):
            raise CheckpointError(f"ledger totals of the checkpoint: source {source!r} is unknown or incomplete")
        if counts["read"] != sum(count for key, count in counts.items() if key != "read"):
            raise CheckpointError(f"ledger totals of the checkpoint do not reconcile for {source!r}: {counts}")
        self._counts[source] = dict(counts)

    def _open(self, path: str, keep: bool) -> None:
        text = storage.read_text(path) if keep and storage.exists(path) else ""
        complete = text[: text.rfind("\n") + 1]  # a run that was killed may have left half a line
        self._lines = complete.split("\n")[:-1]
        for entry in self.rejects:
            self._listed.add((entry["file"], entry["row"]))
        if complete != text or not keep:
            storage.write_text(path, complete)

    def _write(self, rejects: tuple[Reject, ...]) -> None:
        fresh = []
        for reject in rejects:
            source, file, row = self._manifest.locate(reject.row_id)
            if (file, row) not in self._listed:
                self._listed.add((file, row))
                entry = {"source": source, "file": file, "row": row}
                fresh.append(json.dumps(entry | {"reason": reject.reason, "detail": reject.detail}))
        self._lines += fresh
        if not fresh or self._path is None:
            return
        if storage.is_local(self._path):
            _, local = storage.filesystem(self._path)
            Path(local).parent.mkdir(parents=True, exist_ok=True)
            with Path(local).open("a", encoding="utf-8") as stream:
                stream.write("".join(line + "\n" for line in fresh))
        else:  # object stores cannot append
            storage.write_text(self._path, "".join(line + "\n" for line in self._lines))
