"""What became of every row: trained, or dropped for a reason. Counts reconcile at every step.

    {"chat": {"read": 300, "trained": 298, "no_messages": 1, "unknown_role": 1}}

A step's rows are entered when the step has been consumed, in step order; a step entered before does
nothing, so that retried and resumed steps never count twice. `rejects.jsonl` names each dropped row by
source, file and row, without its text.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

from miles import storage
from miles.data.manifest import Manifest
from miles.data.types import StepReport
from miles.errors import DataError

MIN_ROWS_TO_JUDGE = 1_000


class Ledger:
    """Counts per source and the list of rejects.

    Args:
        path: where `rejects.jsonl` is kept (fsspec URL); None: only counts.
        max_bad_fraction: a larger share of rejected rows ends the run.
        totals: of the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        manifest: Manifest,
        path: str | None,
        max_bad_fraction: float,
        totals: Mapping[str, Mapping[str, int]] | None = None,
        next_step: int = 0,
    ) -> None:
        self._manifest, self._path, self._max_bad_fraction = manifest, path, max_bad_fraction
        self._next_step = next_step
        self._counts = [Counter((totals or {}).get(name, {})) for name in manifest.source_names]
        self._lines: list[str] = []
        if path is not None and totals and storage.exists(path):
            # rejects of steps after the checkpoint will come again
            self._lines = storage.read_text(path).splitlines()[: self.num_rejected]

    @property
    def num_read(self) -> int:
        return sum(counts["read"] for counts in self._counts)

    @property
    def num_rejected(self) -> int:
        return self.num_read - sum(counts["trained"] for counts in self._counts)

    @property
    def rejects(self) -> list[dict[str, object]]:
        """`{source, file, row, reason, detail}` of each dropped row."""
        return [json.loads(line) for line in self._lines]

    def totals(self) -> dict[str, dict[str, int]]:
        """source -> {"read", "trained", and a count for each reason}"""
        return {name: dict(c) for name, c in zip(self._manifest.source_names, self._counts, strict=True)}

    def commit(self, report: StepReport) -> None:
        """Enters a consumed step.

        Raises:
            DataError: more rows than `max_bad_fraction` were dropped, once enough were read to judge.
        """
        if report.index < self._next_step:
            return
        assert report.index == self._next_step, f"step {report.index} came before step {self._next_step}"
        self._next_step += 1
        for counts, rows in zip(self._counts, report.source_rows, strict=True):
            counts["read"] += rows
            counts["trained"] += rows
        for reject in report.rejects:
            self._counts[reject.source_id]["trained"] -= 1
            self._counts[reject.source_id][reject.reason] += 1
            source, file, row = self._manifest.locate(reject.row_id)
            entry = {
                "source": source,
                "file": file,
                "row": row,
                "reason": reject.reason,
                "detail": reject.detail,
            }
            self._lines.append(json.dumps(entry, ensure_ascii=False))
        if report.rejects and self._path is not None:
            storage.write_text(self._path, "".join(line + "\n" for line in self._lines))
        if self.num_read >= MIN_ROWS_TO_JUDGE:
            self.judge()

    def judge(self) -> None:
        """Raises:
        DataError: the share of dropped rows is over the limit.
        """
        if self.num_rejected > self._max_bad_fraction * self.num_read:
            raise DataError(
                f"{self.num_rejected} of {self.num_read} rows were dropped, more than --max-bad-fraction "
                f"{self._max_bad_fraction} allows: {self.totals()}. They are named in {self._path}. "
                "Mend the data, or raise the limit."
            )
