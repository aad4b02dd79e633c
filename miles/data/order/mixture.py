"""Weights of sources -> which source each place of the order is of, in a fixed sequence with every share kept.

Weights 3 and 1: source 0 is due at 1/6, 3/6, 5/6 of a period of four places, source 1 at 1/2; what is due first comes
first, the lower source where two are due together:

    place     0 1 2 3 | 4 5 6 7 | 8 …
    source    0 0 1 0 | 0 0 1 0 | 0 …

After any number of places a source has had its share of them to within half a row for each source of the mixture, and
after each period exactly. (Tijdeman, "The chairman assignment problem", 1980, bounds what any sequence can do.) Where a
place lies is arithmetic on integers, so that a run may begin anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from miles.data.types import Int32, Int64


@dataclass(frozen=True)
class Schedule:
    """The endless sequence of sources for integer weights."""

    weights: tuple[int, ...]
    """one a source, positive; their sum is the period"""

    @property
    def period(self) -> int:
        return sum(self.weights)

    @cached_property
    def _one_period(self) -> Int32:
        """int32 [period]. Two times that differ do so by more than a float64 rounds, as the period is bounded; two
        that are equal stay equal, and the stable sort leaves them in the order of the sources."""
        due = np.concatenate([(2 * np.arange(weight) + 1) / weight for weight in self.weights])
        sources = np.repeat(np.arange(len(self.weights), dtype=np.int32), self.weights)
        return sources[np.argsort(due, kind="stable")]

    def sources(self, begin: int, end: int) -> Int32:
        """int32 [end - begin]: the source of each of these places."""
        return self._one_period[np.arange(begin, end, dtype=np.int64) % self.period]

    def counts(self, place: int) -> Int64:
        """int64 [sources]: how many places before this one are of each source."""
        periods, rest = divmod(place, self.period)
        in_this = np.bincount(self._one_period[:rest], minlength=len(self.weights))
        return periods * np.array(self.weights, np.int64) + in_this
