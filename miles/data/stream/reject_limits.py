"""The limits on rejected rows, which end a run: a share, a number in a row, or a fatal reason.

limits = RejectLimits(max_bad_fraction=0.01, max_bad_rows_in_a_row=1_000)
rows of a step   . . x x | x . . .     two rejects in a row, then three across the steps
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from miles.data.config import DataConfig
from miles.data.files.manifest import Manifest
from miles.data.reasons import LEFT_OUT_BY_TRANSFORM
from miles.data.types import Reject, StepRows
from miles.errors import DataError

LENGTH_FLAGS = "--max-sample-tokens (at most what --max-tokens-per-gpu holds)"
"""The flags that decide which row is too long; the first is the second where it is not given."""

FATAL_ADVICE = {
    "too_long": "--too-long error ends the run at the first such row. Shorten or remove it, raise "
    f"{LENGTH_FLAGS}, or choose --too-long drop or truncate_end"
}
"""Reasons that can be fatal -> what to do about such a row."""


@dataclass(frozen=True)
class RejectLimits:
    """The rejected rows that a run bears."""

    max_bad_fraction: float
    """a larger share of the rows ends the run"""
    max_bad_rows_in_a_row: int | None = None
    """as many in a row, in the order of consumption, end the run; None: any number may come"""
    fatal_reasons: frozenset[str] = frozenset()
    """one row rejected for one of these ends the run"""

    @classmethod
    def of(cls, config: DataConfig) -> RejectLimits:
        """Return the limits that a configuration sets."""
        fatal = {"too_long"} if config.encode.too_long == "error" else set()
        return cls(config.max_bad_fraction, config.max_bad_rows_in_a_row, frozenset(fatal))

    def __post_init__(self) -> None:
        assert self.fatal_reasons <= set(FATAL_ADVICE), self.fatal_reasons

    def fatal(self, rejects: Iterable[Reject]) -> list[Reject]:
        """Return the rejects that end the run by themselves."""
        return [reject for reject in rejects if reject.reason in self.fatal_reasons]

    def require_not_fatal(self, rejects: Iterable[Reject], manifest: Manifest) -> None:
        """Refuse rejects that end the run by themselves.

        Raises:
            DataError: names the first of them for each reason.
        """
        if fatal := self.fatal(rejects):
            raise DataError(
                f"of the rows {describe_rejects(fatal, manifest)}. {FATAL_ADVICE[fatal[0].reason]}"
            )

    @staticmethod
    def num_bad(rejects: Iterable[Reject]) -> int:
        """Return how many of the rejects are bad rows: not those that the user's function left out."""
        return sum(reject.reason != LEFT_OUT_BY_TRANSFORM for reject in rejects)

    def is_share_exceeded(self, num_rejected: int, num_rows: int) -> bool:
        """Return whether more than the allowed share of the rows was rejected."""
        return num_rejected > self.max_bad_fraction * num_rows

    def share_error(
        self,
        num_rejected: int,
        rows: str,
        *,
        reasons: str = "",
        advice: str = "",
        account: str = "",
    ) -> DataError:
        """Return the error of a share that is exceeded.

        Args:
            num_rejected: rows that were rejected.
            rows: among which they are counted: "500 rows read".
            reasons: of the rejects.
            advice: on the most frequent one: `account.advice`.
            account: follows on lines of its own.
        """
        named = f": {reasons}" if reasons else ""
        return DataError(
            f"{num_rejected} of the {rows} were dropped, more than the share "
            f"{self.max_bad_fraction} that --max-bad-fraction allows{named}.{advice} Mend or remove "
            f"them, or raise the share.{account}"
        )


@dataclass(frozen=True)
class Streak:
    """Rows that were rejected in a row, in the order of consumption."""

    num_rows: int = 0
    first_row_id: int = 0
    last_row_id: int = 0

    def through(self, rows: StepRows) -> tuple[Streak, Streak]:
        """Follow the streak through the next step.

        Returns:
            The longest streak that ends in the step, and the one that is open after it.
        """
        longest = Streak()
        current = self
        next_position = 0
        bad = [reject for reject in rows.rejects if reject.reason != LEFT_OUT_BY_TRANSFORM]
        for reject in sorted(bad, key=lambda reject: reject.position):
            is_next = current.num_rows > 0 and reject.position == next_position
            first_row_id = current.first_row_id if is_next else reject.row_id
            num_rows = current.num_rows + 1 if is_next else 1
            current = Streak(num_rows, first_row_id, reject.row_id)
            longest = max(longest, current, key=lambda streak: streak.num_rows)
            next_position = reject.position + 1

        is_open = next_position == rows.num_read - rows.num_held_out
        return longest, current if is_open else Streak()


def describe_rejects(rejects: Sequence[Reject], manifest: Manifest) -> str:
    """Return why rows were rejected, with the first row of each reason.

    2 too_long (first: row 7 (from 0) of x.jsonl, 9000 tokens, at most 8192), 1 no_messages (…)
    """
    parts = []
    counts = Counter(reject.reason for reject in rejects)

    for reason, number in counts.most_common():
        first = next(reject for reject in rejects if reject.reason == reason)
        _, file, row = manifest.locate(first.row_id)
        parts.append(f"{number} {reason} (first: row {row} (from 0) of {file}, {first.detail})")
    return ", ".join(parts)
