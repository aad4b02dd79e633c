"""Weights of sources -> the source of each place in the order, with every share kept.

Weights 3 and 1, in periods of four places: source 0 is due at 1/6, 3/6 and 5/6 of a period, source
1 at 1/2. The source that is due first comes first; if two are due together, the lower one does:

    place     0 1 2 3 | 4 5 6 7 | 8 …
    source    0 0 1 0 | 0 0 1 0 | 0 …

After any number of places a source has had its share of them, to within half a row for each source
of the mixture; after each period it has had exactly its share. (Tijdeman, "The chairman assignment
problem", 1980, bounds what any sequence can do.) The source of a place is arithmetic on integers,
so that a run may begin anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from miles.data.types import Int32, Int64


@dataclass(frozen=True)
class Mixture:
    """The endless sequence of sources for integer weights."""

    weights: tuple[int, ...]
    """one for each source, positive; their sum is the period"""

    @property
    def period(self) -> int:
        return sum(self.weights)

    @cached_property
    def _one_period(self) -> Int32:
        """int32 [period]: the source of each place.

        The times at which sources are due are exact enough to sort: two that differ do so by more
        than a float64 rounds, as the period is bounded; two that are equal stay equal, and the
        stable sort leaves them in the order of the sources.
        """
        due = np.concatenate([(2 * np.arange(weight) + 1) / weight for weight in self.weights])
        sources = np.repeat(np.arange(len(self.weights), dtype=np.int32), self.weights)
        return sources[np.argsort(due, kind="stable")]

    def sources(self, begin: int, end: int) -> Int32:
        """Return the source of each of the places: int32 [end - begin]."""
        return self._one_period[np.arange(begin, end, dtype=np.int64) % self.period]

    def counts(self, place: int) -> Int64:
        """Return how many places before this one are of each source: int64 [sources]."""
        periods, rest = divmod(place, self.period)
        in_last_period = np.bincount(self._one_period[:rest], minlength=len(self.weights))
        return periods * np.array(self.weights, np.int64) + in_last_period
