"""The shuffle: the rows of one window, permuted by a seed.

Groups of 3, 2 and 3 rows, windows of 4 rows, seed 42, first epoch:

    rows in file order     0 1 2 | 3 4 | 5 6 7
    groups permuted        3 4 | 0 1 2 | 5 6 7         by (seed, epoch)
    laid out in windows    3 4 0 1 | 2 5 6 7
    ids sorted             0 1 3 4 | 2 5 6 7
    rows permuted          4 0 1 3 | 7 2 6 5           by (seed, epoch, window)

The ids are sorted so that a set within one window is shuffled the same way however it is split into
row groups. One window costs one permutation of the row groups and one of the window's rows. The
rows of the other windows are not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from miles.common.offsets import offsets_of
from miles.data.types import Int64

ALL_SOURCES = -1
"""Stands in place of a source's number for all sources, as one set."""

GROUPS = 0
ROWS = 1
"""The kinds of items that are permuted; part of a permutation's key."""


@dataclass(frozen=True)
class ShuffleKey:
    """The numbers that the order of a window follows from, beside its rows."""

    seed: int
    """64 bits"""
    epoch_index: int
    """the pass through the rows, below 2**24"""
    window_index: int
    """within the pass, below 2**32"""
    source: int = ALL_SOURCES


def shuffled_window(group_starts: Int64, begin: int, end: int, key: ShuffleKey) -> Int64:
    """Return the rows of one window, in the order in which they are taken.

    Args:
        group_starts: int64 [groups + 1]: the first row of each row group, and the end of the last.
        begin, end: the window, as positions among all rows of these row groups, once the groups are
            permuted and laid end to end.

    Returns:
        int64 [end - begin]: row ids.
    """
    rows = np.sort(_rows_between(group_starts, begin, end, key))
    return rows[permutation(len(rows), ROWS, key)]


def _rows_between(group_starts: Int64, begin: int, end: int, key: ShuffleKey) -> Int64:
    """Return the rows at positions [begin, end) of the permuted row groups, group by group."""
    group_order = permutation(len(group_starts) - 1, GROUPS, key)
    lengths = np.diff(group_starts)[group_order]
    offsets = offsets_of(lengths)

    # The groups that overlap [begin, end). The first and the last may be cut; one alone, twice.
    first = int(np.searchsorted(offsets[1:], begin, side="right"))
    last = int(np.searchsorted(offsets[1:], end, side="left"))

    pieces = []
    for position in range(first, last + 1):
        offset = int(offsets[position])
        cut_begin = max(begin - offset, 0)
        cut_end = min(end - offset, int(lengths[position]))
        first_row = int(group_starts[group_order[position]])
        pieces.append(np.arange(first_row + cut_begin, first_row + cut_end, dtype=np.int64))
    return np.concatenate(pieces)


def permutation(size: int, what: int, key: ShuffleKey) -> Int64:
    """Return a permutation that depends on the arguments alone, on any machine and with any numpy.

    It is the order of 64-bit numbers that the counter-based generator Philox-4x64 (Salmon et al.,
    "Parallel random numbers: as easy as 1, 2, 3", SC 2011) draws under a key made of the arguments.
    numpy promises a stable stream for its bit generators, not for `Generator.permutation`. The
    source's number is the counter's last word, which no draw reaches.

    Args:
        size: number of items.
        what: `GROUPS`, whose permutation is the same in all windows of an epoch, or `ROWS`.

    Returns:
        int64 [size]
    """
    window_index = key.window_index if what == ROWS else 0
    assert 0 <= key.seed < 2**64, key.seed
    assert 0 <= key.epoch_index < 2**24, key.epoch_index
    assert 0 <= window_index < 2**32, window_index

    words = [key.seed, key.epoch_index << 40 | what << 32 | window_index]
    counter = np.array([0, 0, 0, key.source + 1], dtype=np.uint64)
    generator = np.random.Philox(counter=counter, key=np.array(words, dtype=np.uint64))
    return np.argsort(generator.random_raw(size), kind="stable").astype(np.int64)
