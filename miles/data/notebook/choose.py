"""Which rows a preview shows, by what is known of the rows that were looked at.

where            rows
None             the first ones that are usable
"random"         usable ones, drawn by `seed`
"longest"        those with the most tokens, the longest first
"least_trained"  those of whose tokens the smallest share is trained
"dropped"        the first ones that are dropped
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from miles.data.types import Float64, Int64
from miles.errors import ConfigError

WHERE = ("longest", "least_trained", "dropped", "random")


@dataclass(frozen=True, eq=False)
class Looked:
    """The rows that were looked at, and what became of each."""

    row_ids: Int64
    """int64 [rows]"""
    lengths: Int64
    """int64 [rows]: tokens of each; 0: it is dropped"""
    trained: Int64
    """int64 [rows]: trained tokens of each"""

    @property
    def shares(self) -> Float64:
        """float64 [rows]: trained tokens of each, as a share; 2 where the row is dropped."""
        shares = np.full(len(self.lengths), 2.0)
        np.divide(self.trained, self.lengths, out=shares, where=self.lengths > 0)
        return shares


def require_where(where: str | None) -> None:
    """Refuse a choice that there is not.

    Raises:
        ConfigError: names those that there are.
    """
    if where is not None and where not in WHERE:
        words = ", ".join(map(repr, WHERE))
        raise ConfigError(f"preview: where must be one of {words}, or None, not {where!r}")


def chosen(looked: Looked, where: str, num_rows: int) -> Int64:
    """Return the rows that a preview shows, int64 [num_rows or fewer].

    Args:
        where: "longest", "least_trained" or "dropped".
    """
    is_usable = looked.lengths > 0
    if where == "dropped":
        return looked.row_ids[~is_usable][:num_rows]
    keys = -looked.lengths if where == "longest" else looked.shares
    order = np.argsort(keys, kind="stable")
    return looked.row_ids[order[is_usable[order]]][:num_rows]


def drawn(num_all: int, num_rows: int, seed: int) -> Int64:
    """Return rows of a data set, drawn without repetition: int64 [num_rows or fewer]."""
    generator = np.random.Generator(np.random.Philox(seed))
    size = min(num_rows, num_all)
    return generator.choice(num_all, size, replace=False).astype(np.int64)
