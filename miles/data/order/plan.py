"""The plan: which rows step k has, by arithmetic on row counts, a seed and a batch size.

With groups of 3, 2 and 3 rows, windows of 4 rows, a batch of 2 and seed 42, the first epoch is

    rows in file order     0 1 2 | 3 4 | 5 6 7
    shuffled windows       4 0 1 3 | 7 2 6 5           see `shuffle`
    cut into steps         4 0, 1 3, 7 2, 6 5

No step crosses a window, since a window is a multiple of the batch, nor an epoch: the last step of
an epoch is short, or left out with `drop_last`. `consumed_rows` counts rows over epochs. Without
shuffle the order is that of the files.

With weights, each source is read by itself in passes that repeat without end, each shuffled as an
epoch is above; `mixture` says which source gives the next row. An epoch then has as many rows as
all sources together.

    weights 3 1                    source 0: rows 0 1 2 3 4, source 1: rows 5 6 7       (no shuffle)
    sources of the mixture         0 0 1 0 | 0 0 1 0
    the next row of each           0 1 5 2 | 3 4 6 0     source 0 has begun its second pass
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from miles.common.counts import counted
from miles.data.config import OrderConfig
from miles.data.order.mixture import Mixture
from miles.data.order.shuffle import ALL_SOURCES, ShuffleKey, shuffled_window
from miles.data.types import Int64
from miles.errors import ConfigError

MAX_PASSES = 1 << 24
"""Passes through a source, at most: the key of a permutation has no room for more."""


@dataclass(frozen=True)
class WindowRef:
    """The name of a window: all that a loader's task needs to find its rows."""

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
    """int64 [rows], in the order in which they are taken"""


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
                f"{counted(self.num_rows, 'row')} cannot fill one step of --rollout-batch-size "
                f"{self.order.batch_size}, and --drop-last leaves out the short one: lower the "
                "first or do without the second"
            )

        num_rows = self.rows_per_epoch * self.num_epoch
        if self.order.weights and max(self.source_passes(num_rows)) > MAX_PASSES:
            raise ConfigError(
                f"--prompt-data-weights {self.order.weights} repeat a source over {MAX_PASSES:,} "
                f"times in {counted(self.num_epoch, 'epoch')}: it has too few rows for its weight"
            )

    @property
    def num_rows(self) -> int:
        return int(self.group_starts[-1])

    @property
    def num_sources(self) -> int:
        return len(self.source_groups) - 1

    @cached_property
    def source_rows(self) -> Int64:
        """int64 [sources]: the number of rows of each source."""
        return np.diff(self.group_starts[self.source_groups])

    @property
    def rows_per_epoch(self) -> int:
        """The rows that an epoch consumes: all, or with `drop_last` those of full steps."""
        if self.order.drop_last:
            return self.num_rows - self.num_rows % self.order.batch_size
        return self.num_rows

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows_per_epoch // self.order.batch_size)

    @property
    def num_epoch(self) -> int:
        """Times over the rows: those of the order, or as many as the run's steps take."""
        if self.order.num_epoch is not None:
            return self.order.num_epoch
        return -(-(self.order.max_steps or 1) // self.steps_per_epoch)

    @property
    def num_steps(self) -> int:
        return self.steps_per_epoch * self.num_epoch

    def step_at(self, start_row: int) -> int:
        """Return the step that comes after `start_row` consumed rows.

        Raises:
            ConfigError: no step begins there.
        """
        epoch_index, row = divmod(start_row, self.rows_per_epoch)
        if start_row < 0 or row % self.order.batch_size:
            raise ConfigError(
                f"no step begins at row {start_row}: an epoch has {self.rows_per_epoch} rows in "
                f"steps of {self.order.batch_size}"
            )
        return epoch_index * self.steps_per_epoch + row // self.order.batch_size

    def windows(self, start_row: int) -> Iterator[WindowRef]:
        """Return the windows of all epochs, from the one that holds the step at `start_row`.

        Raises:
            ConfigError: no step begins at `start_row`.
        """
        first_step = self.step_at(start_row)  # here, so that the error is raised by the call
        return self._windows_from(first_step)

    def _windows_from(self, first_step: int) -> Iterator[WindowRef]:
        steps_per_window = self.order.rounded_window_rows // self.order.batch_size
        windows_per_epoch = -(-self.steps_per_epoch // steps_per_window)
        first_epoch, step = divmod(first_step, self.steps_per_epoch)
        first_window = step // steps_per_window

        for epoch_index in range(first_epoch, self.num_epoch):
            offset = epoch_index * self.steps_per_epoch
            for window_index in range(first_window, windows_per_epoch):
                begin = window_index * steps_per_window
                end = min(begin + steps_per_window, self.steps_per_epoch)
                yield WindowRef(epoch_index, window_index, offset + begin, offset + end - 1)
            first_window = 0

    def window_steps(self, ref: WindowRef) -> list[PlannedStep]:
        """Return all steps of a window, also the ones before a `start_row` within it."""
        row_ids = self._window_rows(ref.epoch_index, ref.window_index)
        window_begin = ref.window_index * self.order.rounded_window_rows
        epoch_begin = ref.epoch_index * self.rows_per_epoch

        steps = []
        for number in range(ref.last_step - ref.first_step + 1):
            begin = number * self.order.batch_size
            rows = row_ids[begin : begin + self.order.batch_size]
            next_row = epoch_begin + window_begin + begin + len(rows)
            epoch = next_row / self.rows_per_epoch
            steps.append(PlannedStep(ref.first_step + number, epoch, next_row, rows))
        return steps

    def source_passes(self, consumed_rows: int) -> list[float]:
        """Return how many times a weighted mixture has read each source: [sources]."""
        return (self._mixture.counts(consumed_rows) / self.source_rows).tolist()

    def source_window_rows(self, source: int) -> int:
        """Return how many rows of a source are shuffled among each other.

        Without weights that is a window. With weights it is the source's share of one, so that few
        rows are read that the window does not take; but at least an eighth of a window, for the
        sake of the shuffle.
        """
        window = self.order.rounded_window_rows
        weights = self.order.integer_weights
        if not weights:
            return window
        return max(-(-window * weights[source] // sum(weights)), -(-window // 8))

    @cached_property
    def _mixture(self) -> Mixture:
        return Mixture(self.order.integer_weights)

    def _window_rows(self, epoch_index: int, window_index: int) -> Int64:
        """Return the rows of a window in the order in which they are taken: int64 [rows]."""
        begin = window_index * self.order.rounded_window_rows
        end = min(begin + self.order.rounded_window_rows, self.num_rows)
        if not self.order.weights:
            return self._ordered(ALL_SOURCES, epoch_index, window_index, begin, end)

        end = min(end, self.rows_per_epoch)
        epoch_begin = epoch_index * self.rows_per_epoch
        return self._mixed(epoch_begin + begin, epoch_begin + end)

    def _mixed(self, begin: int, end: int) -> Int64:
        """Return the rows at places [begin, end) of a weighted mixture, counted over epochs."""
        sources = self._mixture.sources(begin, end)
        drawn_before = self._mixture.counts(begin)
        drawn_after = self._mixture.counts(end)

        rows = np.empty(end - begin, np.int64)
        for source in np.unique(sources).tolist():
            drawn = self._drawn(source, int(drawn_before[source]), int(drawn_after[source]))
            rows[sources == source] = drawn
        return rows

    def _drawn(self, source: int, begin: int, end: int) -> Int64:
        """Return rows of a source by their place in its endless passes: int64 [end - begin]."""
        num_rows = int(self.source_rows[source])
        window_rows = self.source_window_rows(source)

        pieces = []
        while begin < end:
            pass_index, row = divmod(begin, num_rows)
            window_index, skipped = divmod(row, window_rows)
            window_begin = row - skipped
            window_end = min(window_begin + window_rows, num_rows)
            num_taken = min(window_end - row, end - begin)

            rows = self._ordered(source, pass_index, window_index, window_begin, window_end)
            pieces.append(rows[skipped : skipped + num_taken])
            begin += num_taken
        return np.concatenate(pieces)

    def _ordered(
        self, source: int, epoch_index: int, window_index: int, begin: int, end: int
    ) -> Int64:
        """Return one window of a source, or of all sources, shuffled if that is asked for.

        Args:
            source: its number, or `ALL_SOURCES`.
            begin, end: the window, as positions among the rows of the source.

        Returns:
            int64 [end - begin]: row ids.
        """
        group_starts = self.group_starts
        if source != ALL_SOURCES:
            first, last = self.source_groups[source : source + 2]
            group_starts = group_starts[first : last + 1]

        if not self.order.shuffle:
            return np.arange(group_starts[0] + begin, group_starts[0] + end, dtype=np.int64)
        key = ShuffleKey(self.order.seed, epoch_index, window_index, source)
        return shuffled_window(group_starts, begin, end, key)
