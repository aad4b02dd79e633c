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
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from miles.data.config import OrderConfig
from miles.data.types import Int64
from miles.errors import ConfigError

_GROUPS, _ROWS = 0, 1
"""What a permutation is of; part of its key."""


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

    num_rows: int
    group_starts: Int64
    """int64 [groups + 1], from 0 to `num_rows`"""
    order: OrderConfig

    def __post_init__(self) -> None:
        assert len(self.group_starts) > 1, "no row group"
        assert self.group_starts[0] == 0, "row groups begin at row 0"
        assert self.group_starts[-1] == self.num_rows, "row groups end at the last row"
        if self.rows_per_epoch == 0:
            raise ConfigError(
                f"{self.num_rows} rows do not fill one step of --rollout-batch-size {self.order.batch_size}, and "
                "--drop-last leaves out the short one: lower the first or do without the second"
            )

    @property
    def rows_per_epoch(self) -> int:
        """What `consumed_rows` grows by in an epoch: all rows, or with `drop_last` those of whole steps."""
        return self.num_rows - (self.num_rows % self.order.batch_size if self.order.drop_last else 0)

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
            end = ref.window_index * self.order.rounded_window_rows + number * self.order.batch_size + len(rows)
            next_row = ref.epoch_index * self.rows_per_epoch + end
            steps.append(PlannedStep(step, next_row / self.rows_per_epoch, next_row, rows))
        return steps

    def _window_rows(self, epoch_index: int, window_index: int) -> Int64:
        """int64 [rows]: the rows of a window in the order in which they are taken."""
        begin = window_index * self.order.rounded_window_rows
        end = min(begin + self.order.rounded_window_rows, self.num_rows)
        if not self.order.shuffle:
            return np.arange(begin, end, dtype=np.int64)
        group_order = permutation(len(self.group_starts) - 1, self.order.seed, epoch_index, _GROUPS, 0)
        lengths = np.diff(self.group_starts)[group_order]
        ends = np.cumsum(lengths)
        # The groups that overlap [begin, end); the first and the last may be cut, one alone at both ends.
        first = int(np.searchsorted(ends, begin, side="right"))
        last = int(np.searchsorted(ends, end, side="left"))
        pieces = []
        for position in range(first, last + 1):
            group_begin = int(ends[position] - lengths[position])
            row = int(self.group_starts[group_order[position]])
            pieces.append(
                np.arange(
                    row + max(begin - group_begin, 0),
                    row + min(end - group_begin, int(lengths[position])),
                    dtype=np.int64,
                )
            )
        rows = np.sort(np.concatenate(pieces))
        return rows[permutation(len(rows), self.order.seed, epoch_index, _ROWS, window_index)]


def permutation(size: int, seed: int, epoch_index: int, what: int, window_index: int) -> Int64:
    """A permutation of `size` things that depends on nothing but its arguments, on any machine and numpy.

    The order of 64-bit numbers drawn from the counter-based generator Philox-4x64 (Salmon et al., "Parallel
    random numbers: as easy as 1, 2, 3", SC 2011) under a key made of the arguments. numpy promises a stable
    stream for its bit generators, not for `Generator.permutation`.

    Returns:
        int64 [size]
    """
    assert 0 <= seed < 2**64, seed
    assert 0 <= epoch_index < 2**24, epoch_index
    assert 0 <= window_index < 2**32, window_index
    key = np.array([seed, epoch_index << 40 | what << 32 | window_index], dtype=np.uint64)
    draws = np.random.Philox(key=key).random_raw(size)
    return np.argsort(draws, kind="stable").astype(np.int64)
