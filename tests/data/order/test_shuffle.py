"""The shuffle of one window: golden, a permutation of its rows, the same however they are split."""

from __future__ import annotations

import numpy as np
import pytest

from miles.common.offsets import offsets_of
from miles.data.order.shuffle import GROUPS, ROWS, ShuffleKey, permutation, shuffled_window

KEY = ShuffleKey(seed=42, epoch_index=0, window_index=0)


def test_golden_permutation() -> None:
    key = ShuffleKey(seed=7, epoch_index=1, window_index=2)
    assert permutation(5, ROWS, key).tolist() == [0, 3, 4, 1, 2]


def test_golden_windows() -> None:
    group_starts = offsets_of([3, 2, 3])
    second = ShuffleKey(seed=42, epoch_index=0, window_index=1)

    assert shuffled_window(group_starts, 0, 4, KEY).tolist() == [4, 0, 1, 3]
    assert shuffled_window(group_starts, 4, 8, second).tolist() == [7, 2, 6, 5]


def test_all_windows_share_the_group_order() -> None:
    orders = [permutation(50, GROUPS, ShuffleKey(1, 2, window)).tolist() for window in range(3)]
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize(
    "key", [ShuffleKey(43, 0, 0), ShuffleKey(42, 1, 0), ShuffleKey(42, 0, 0, 1)]
)
def test_seed_epoch_and_source_change_the_order(key: ShuffleKey) -> None:
    for what in (GROUPS, ROWS):
        assert permutation(50, what, key).tolist() != permutation(50, what, KEY).tolist()


def test_rows_keep_their_ids_in_a_later_source() -> None:
    rows = shuffled_window(np.array([10, 14, 20]), 0, 10, KEY)
    assert sorted(rows.tolist()) == list(range(10, 20))
