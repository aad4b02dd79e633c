"""Which rows are in step k: arithmetic on row counts, a seed and a batch size.

With groups of 3, 2, 3 rows, windows of W = 4 rows, a batch of B = 2 and seed 42, the first epoch is made so:

    rows in file order     0 1 2 | 3 4 | 5 6 7
    groups permuted        3 4 | 0 1 2 | 5 6 7           by (seed, epoch)
    laid out in windows    3 4 0 1 | 2 5 6 7
    ids sorted             0 1 3 4 | 2 5 6 7             so that a set within one window is shuffled
    permuted               4 0 1 3 | 7 2 6 5             by (seed, epoch, window)     the same however split
    cut into steps         4 0, 1 3, 7 2, 6 5

No step crosses a window, since W is a multiple of B, nor an epoch: the last step of an epoch is short,
or left out with `drop_last`. `consumed_rows` counts rows over epochs. Finding a window permutes the row
groups, never the rows of the whole set. Without shuffle the order is that of the files.

With weights, each source is gone through by itself, again and again, each pass made as an epoch is above; `mixture`
says which source gives the next row. An epoch is then as many rows as all sources have together.

    weights 3 1                    source 0: rows 0 1 2 3 4, source 1: rows 5 6 7       (no shuffle)
    sources by the schedule        0 0 1 0 | 0 0 1 0
    the next row of each           0 1 5 2 | 3 4 6 0     source 0 has begun its second pass
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from miles.common.offsets import offsets_of
from miles.data.config import OrderConfig
from miles.data.order.mixture import Schedule
from miles.data.types import Int64
from miles.errors import ConfigError

_GROUPS, _ROWS = 0, 1
"""What a permutation is of; part of its key."""

MAX_PASSES = 1 << 24
"""Of a source through its rows; the key of a permutation has no room for more."""

_WHOLE_SET = -1
"""In place of a source's number: all sources as one set."""


@dataclass(frozen=True)
class WindowRef:
    """A window's name: all that a loader's task needs to be told."""

    epoch_index: int
    window_index: int
    """within the epoch"""
    first_step: int
    """counting over epochs"""
    last_step: int
    """inclusive"""


@dataclass(frozen=True, eq=False)
class PlannedStep:
    """The rows of one optimizer step."""

    step: int
    """counting over epochs"""
    epoch: float
    """epochs consumed after the step"""
    next_row: int
    """`consumed_rows` after the step"""
    row_ids: Int64
    """int64 [rows], in the order in which they are laid out"""


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of a run."""

    group_starts: Int64
    """int64 [groups + 1]: the first row of each row group, and the number of rows"""
    source_groups: Int64
    """int64 [sources + 1]: the first row group of each source, and the number of groups"""
    order: OrderConfig

    def __post_init__(self) -> None:
        assert len(self.group_starts) > 1, "no row group"
        assert self.group_starts[0] == 0, "row groups begin at row 0"
        assert self.source_groups[0] == 0, "the first source begins at group 0"
        assert self.source_groups[-1] == len(self.group_starts) - 1, (
            "the last source ends with the last group"
        )
        assert len(self.order.weights) in (0, self.num_sources), "a weight for each source"
        if self.rows_per_epoch == 0:
            raise ConfigError(
                f"{self.num_rows} rows do not fill one step of --rollout-batch-size {self.order.batch_size}, and "
                "--drop-last leaves out the short one: lower the first or do without the second"
            )
        if (
            self.order.weights
            and max(self.source_passes(self.rows_per_epoch * self.order.num_epoch)) > MAX_PASSES
        ):
            raise ConfigError(
                f"--prompt-data-weights {self.order.weights} repeat a source over {MAX_PASSES:,} times in "
                f"{self.order.num_epoch} epoch(s): it has too few rows for its weight"
            )

    @property
    def num_rows(self) -> int:
        return int(self.group_starts[-1])

    @property
    def num_sources(self) -> int:
        return len(self.source_groups) - 1

    @cached_property
    def source_rows(self) -> Int64:
        """int64 [sources]: rows of each."""
        return np.diff(self.group_starts[self.source_groups])

    @property
    def rows_per_epoch(self) -> int:
        """What `consumed_rows` grows by in an epoch: all rows, or with `drop_last` those of whole steps."""
        return self.num_rows - (
            self.num_rows % self.order.batch_size if self.order.drop_last else 0
        )

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows_per_epoch // self.order.batch_size)

    @property
    def num_steps(self) -> int:
        return self.steps_per_epoch * self.order.num_epoch

    def step_at(self, start_row: int) -> int:
        """The step that comes after `start_row` consumed rows.

        Raises:
            ConfigError: no step begins there.
        """
        epoch_index, row = divmod(start_row, self.rows_per_epoch)
        if start_row < 0 or row % self.order.batch_size:
            raise ConfigError(
                f"no step begins at row {start_row}: an epoch has {self.rows_per_epoch} rows in steps of "
                f"{self.order.batch_size}"
            )
        return epoch_index * self.steps_per_epoch + row // self.order.batch_size

    def windows(self, start_row: int) -> Iterator[WindowRef]:
        """The windows from the one that holds the step after `start_row` on, over all epochs; none at the end.

        Raises:
            ConfigError: no step begins at `start_row`.
        """
        first_step = self.step_at(start_row)
        return self._windows_from(first_step)

    def _windows_from(self, first_step: int) -> Iterator[WindowRef]:
        steps_per_window = self.order.rounded_window_rows // self.order.batch_size
        windows_per_epoch = -(-self.steps_per_epoch // steps_per_window)
        first_epoch, step = divmod(first_step, self.steps_per_epoch)
        first_window = step // steps_per_window
        for epoch_index in range(first_epoch, self.order.num_epoch):
            for window_index in range(first_window, windows_per_epoch):
                begin = window_index * steps_per_window
                end = min(begin + steps_per_window, self.steps_per_epoch)
                offset = epoch_index * self.steps_per_epoch
                yield WindowRef(epoch_index, window_index, offset + begin, offset + end - 1)
            first_window = 0

    def window_steps(self, ref: WindowRef) -> list[PlannedStep]:
        """All steps of a window, also those before a `start_row` within it."""
        row_ids = self._window_rows(ref.epoch_index, ref.window_index)
        steps = []
        for number, step in enumerate(range(ref.first_step, ref.last_step + 1)):
            rows = row_ids[number * self.order.batch_size : (number + 1) * self.order.batch_size]
            end = (
                ref.window_index * self.order.rounded_window_rows
                + number * self.order.batch_size
                + len(rows)
            )
            next_row = ref.epoch_index * self.rows_per_epoch + end
            steps.append(PlannedStep(step, next_row / self.rows_per_epoch, next_row, rows))
        return steps

    def source_passes(self, consumed_rows: int) -> list[float]:
        """[sources]: how many times a weighted mixture has gone through each source after so many rows."""
        return (self._schedule.counts(consumed_rows) / self.source_rows).tolist()

    def source_window_rows(self, source: int) -> int:
        """Rows of a source that are shuffled among each other: a window.

        Of a weighted mixture its share of one, so that little is read that the window does not take; an eighth of one
        where that is more, for the shuffle's sake.
        """
        window, weights = self.order.rounded_window_rows, self.order.integer_weights
        if not weights:
            return window
        return max(-(-window * weights[source] // sum(weights)), -(-window // 8))

    @cached_property
    def _schedule(self) -> Schedule:
        return Schedule(self.order.integer_weights)

    def _window_rows(self, epoch_index: int, window_index: int) -> Int64:
        """int64 [rows]: the rows of a window in the order in which they are taken."""
        begin = window_index * self.order.rounded_window_rows
        end = min(begin + self.order.rounded_window_rows, self.num_rows)
        if not self.order.weights:
            return self._shuffled(_WHOLE_SET, epoch_index, window_index, begin, end)
        first = epoch_index * self.rows_per_epoch + begin
        end = first + min(end, self.rows_per_epoch) - begin
        sources = self._schedule.sources(first, end)
        drawn_before, drawn_after = self._schedule.counts(first), self._schedule.counts(end)
        rows = np.empty(end - first, np.int64)
        for source in np.unique(sources).tolist():
            rows[sources == source] = self._drawn(
                source, int(drawn_before[source]), int(drawn_after[source])
            )
        return rows

    def _drawn(self, source: int, begin: int, end: int) -> Int64:
        """int64 [end - begin]: rows of a source by their place in the endless sequence of its passes."""
        num_rows, window_rows = int(self.source_rows[source]), self.source_window_rows(source)
        pieces = []
        while begin < end:
            pass_index, row = divmod(begin, num_rows)
            window_index, skipped = divmod(row, window_rows)
            window_begin = row - skipped
            window_end = min(window_begin + window_rows, num_rows)
            taken = min(window_end - row, end - begin)
            rows = self._shuffled(source, pass_index, window_index, window_begin, window_end)
            pieces.append(rows[skipped : skipped + taken])
            begin += taken
        return np.concatenate(pieces)

    def _shuffled(
        self, source: int, epoch_index: int, window_index: int, begin: int, end: int
    ) -> Int64:
        """int64 [end - begin]: the rows of one window of a source, or of the whole set, in the order of one epoch."""
        groups = (
            slice(0, None)
            if source == _WHOLE_SET
            else slice(*self.source_groups[source : source + 2].tolist())
        )
        starts, ends = self.group_starts[:-1][groups], self.group_starts[1:][groups]
        if not self.order.shuffle:
            return np.arange(starts[0] + begin, starts[0] + end, dtype=np.int64)
        group_order = permutation(len(starts), self.order.seed, epoch_index, _GROUPS, 0, source)
        lengths = (ends - starts)[group_order]
        laid_offsets = offsets_of(lengths)
        # The groups that overlap [begin, end); the first and the last may be cut, one alone at both ends.
        first = int(np.searchsorted(laid_offsets[1:], begin, side="right"))
        last = int(np.searchsorted(laid_offsets[1:], end, side="left"))
        pieces = []
        for position in range(first, last + 1):
            laid_begin = int(laid_offsets[position])
            row = int(starts[group_order[position]])
            cut_begin, cut_end = (
                max(begin - laid_begin, 0),
                min(end - laid_begin, int(lengths[position])),
            )
            pieces.append(np.arange(row + cut_begin, row + cut_end, dtype=np.int64))
        rows = np.sort(np.concatenate(pieces))
        return rows[
            permutation(len(rows), self.order.seed, epoch_index, _ROWS, window_index, source)
        ]


def permutation(
    size: int, seed: int, epoch_index: int, what: int, window_index: int, source: int = _WHOLE_SET
) -> Int64:
    """A permutation of `size` things that depends on nothing but its arguments, on any machine and numpy.

    The order of 64-bit numbers drawn from the counter-based generator Philox-4x64 (Salmon et al., "Parallel
    random numbers: as easy as 1, 2, 3", SC 2011) under a key made of the arguments. numpy promises a stable
    stream for its bit generators, not for `Generator.permutation`. The source's number is the counter's last word,
    which no draw reaches.

    Returns:
        int64 [size]
    """
    assert 0 <= seed < 2**64, seed
    assert 0 <= epoch_index < 2**24, epoch_index
    assert 0 <= window_index < 2**32, window_index
    key = np.array([seed, epoch_index << 40 | what << 32 | window_index], dtype=np.uint64)
    counter = np.array([0, 0, 0, source + 1], dtype=np.uint64)
    draws = np.random.Philox(counter=counter, key=key).random_raw(size)
    return np.argsort(draws, kind="stable").astype(np.int64)
