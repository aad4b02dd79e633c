"""The order contract: which rows are in which step, and that a resume at any step changes
nothing."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.common.offsets import offsets_of
from miles.data.config import OrderConfig
from miles.data.order.plan import Plan, PlannedStep
from miles.errors import ConfigError


def plan_of(*sources: list[int], **order: Any) -> Plan:
    """Return the plan for sources, each given as the rows of its row groups."""
    group_starts = offsets_of(list(chain.from_iterable(sources)))
    source_groups = offsets_of([len(groups) for groups in sources])
    return Plan(group_starts, source_groups, OrderConfig(**order))


def steps_of(plan: Plan, start_row: int = 0) -> list[PlannedStep]:
    first = plan.step_at(start_row)
    return [
        step
        for ref in plan.windows(start_row)
        for step in plan.window_steps(ref)
        if step.step >= first
    ]


def rows_of(plan: Plan) -> list[list[int]]:
    return [step.row_ids.tolist() for step in steps_of(plan)]


def test_golden_order() -> None:
    """Written out: if this changes, every cursor in every checkpoint is wrong."""
    plan = plan_of([3, 2, 3], batch_size=2, window_rows=4, shuffle=True, seed=42, num_epoch=2)
    assert rows_of(plan) == [[4, 0], [1, 3], [7, 2], [6, 5], [2, 1], [0, 3], [4, 5], [6, 7]]


def test_file_order_without_shuffle() -> None:
    plan = plan_of([3, 4], batch_size=2, window_rows=4, num_epoch=2)
    steps = steps_of(plan)
    assert [s.row_ids.tolist() for s in steps] == [[0, 1], [2, 3], [4, 5], [6]] * 2
    assert [s.step for s in steps] == list(range(8))
    assert [s.next_row for s in steps] == [2, 4, 6, 7, 9, 11, 13, 14]
    assert steps[3].epoch == 1.0
    assert steps[-1].epoch == 2.0
    assert steps[4].epoch == 9 / 7


def test_drop_last_leaves_out_short_steps() -> None:
    plan = plan_of([3, 4], batch_size=2, window_rows=6, num_epoch=2, drop_last=True)
    # The window of row 6 has no step, and is not planned.
    assert rows_of(plan) == [[0, 1], [2, 3], [4, 5]] * 2
    assert (plan.rows_per_epoch, plan.steps_per_epoch, plan.num_steps) == (6, 3, 6)
    assert [s.next_row for s in steps_of(plan)] == [2, 4, 6, 8, 10, 12]
    with pytest.raises(ConfigError, match="--drop-last"):
        plan_of([3], batch_size=4, drop_last=True)


def test_steps_without_epochs_take_as_many_as_they_need() -> None:
    plan = {"batch_size": 2, "window_rows": 4, "shuffle": True, "seed": 3}
    for max_steps, num_epoch in ((None, 1), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)):
        limited = plan_of([3, 4], **plan, max_steps=max_steps)
        assert limited.num_epoch == num_epoch
        assert rows_of(limited) == rows_of(plan_of([3, 4], **plan, num_epoch=num_epoch))
    assert plan_of([3, 4], **plan, num_epoch=2, max_steps=100).num_steps == 8


def test_drop_last_only_leaves_out() -> None:
    """A shuffled epoch has the same steps, less the short one."""
    kept = plan_of([5, 6], batch_size=4, window_rows=8, shuffle=True)
    dropped = plan_of([5, 6], batch_size=4, window_rows=8, shuffle=True, drop_last=True)
    assert rows_of(dropped) == rows_of(kept)[:-1]


def test_one_window_ignores_the_row_groups() -> None:
    orders = [
        rows_of(plan_of(groups, batch_size=4, window_rows=32, shuffle=True, num_epoch=3))
        for groups in ([20], [7, 13], [1] * 20, [5, 0, 15])
    ]
    assert orders[0] == orders[1] == orders[2] == orders[3]


def test_epochs_and_seeds_differ() -> None:
    plan = plan_of([64], batch_size=64, window_rows=64, shuffle=True, num_epoch=2, seed=1)
    first, second = rows_of(plan)
    (other,) = rows_of(plan_of([64], batch_size=64, window_rows=64, shuffle=True, seed=2))
    assert first != second
    assert first != other
    assert first != sorted(first)


def test_groups_larger_than_a_window_are_split() -> None:
    plan = plan_of([10, 3], batch_size=2, window_rows=4, shuffle=True)
    windows = [
        np.concatenate([s.row_ids for s in plan.window_steps(ref)]) for ref in plan.windows(0)
    ]
    assert [len(window) for window in windows] == [4, 4, 4, 1]
    assert sorted(np.concatenate(windows).tolist()) == list(range(13))


def test_a_window_is_found_directly() -> None:
    plan = plan_of([100] * 50, batch_size=8, window_rows=64, shuffle=True, num_epoch=2)
    refs = list(plan.windows(0))
    last = plan.window_steps(refs[-1])  # first of all
    assert last[-1].next_row == plan.num_rows * 2
    later = list(plan.windows(5_000 + 640))
    assert later[0] == refs[len(refs) // 2 + 10]
    assert later == refs[-len(later) :]


def test_a_million_row_groups_are_no_burden() -> None:
    plan = plan_of([1_000] * 1_000_000, batch_size=128, window_rows=4_096, shuffle=True)
    ref = next(plan.windows(128 * 700_000))
    assert sum(len(step.row_ids) for step in plan.window_steps(ref)) == 4_096


@pytest.mark.parametrize("start_row", [1, 8, 13, -2])
def test_a_start_between_steps_is_refused(start_row: int) -> None:
    # Steps begin at 0 2 4 6 | 7 9 11 13 | 14.
    plan = plan_of([7], batch_size=2, window_rows=4, num_epoch=2)
    if start_row == 13:
        assert [s.row_ids.tolist() for s in steps_of(plan, start_row)] == [[6]]
        return
    with pytest.raises(ConfigError, match=f"row {start_row}"):
        plan.windows(start_row)


def test_nothing_is_left_at_the_end() -> None:
    plan = plan_of([7], batch_size=2, window_rows=4, num_epoch=2)
    assert list(plan.windows(14)) == []


orders = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 9),
        "window_rows": st.integers(1, 40),
        "seed": st.integers(0, 2**63 - 1),
        "shuffle": st.booleans(),
        "drop_last": st.booleans(),
        "num_epoch": st.integers(1, 3),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    sources=st.lists(
        st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any), min_size=1, max_size=3
    ),
    weights=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    order=orders,
)
def test_mixtures_keep_shares_and_resume_anywhere(
    sources: list[list[int]], weights: list[int], order: dict[str, int]
) -> None:
    if sum(map(sum, sources)) < (order["batch_size"] if order["drop_last"] else 1):
        return
    shares = np.array(weights[: len(sources)])
    plan = plan_of(*sources, **order, weights=tuple(shares))
    steps = steps_of(plan)
    assert [step.step for step in steps] == list(range(plan.num_steps))

    ends = np.cumsum([sum(groups) for groups in sources])
    drawn = np.zeros(len(sources))
    for step in steps:
        drawn += np.bincount(
            np.searchsorted(ends, step.row_ids, side="right"), minlength=len(sources)
        )
        assert np.abs(drawn - step.next_row * shares / shares.sum()).max() <= len(sources) / 2
        assert drawn.sum() == step.next_row

    for i in range(len(steps)):
        resumed = steps_of(plan, steps[i].next_row)
        assert [(s.step, s.row_ids.tolist()) for s in resumed] == [
            (s.step, s.row_ids.tolist()) for s in steps[i + 1 :]
        ]


@settings(max_examples=150, deadline=None)
@given(groups=st.lists(st.integers(0, 15), min_size=1, max_size=8), order=orders)
def test_rows_come_once_and_resume_anywhere(groups: list[int], order: dict[str, int]) -> None:
    if sum(groups) < (order["batch_size"] if order["drop_last"] else 1):
        return
    plan = plan_of(groups, **order)
    steps = steps_of(plan)
    assert [step.step for step in steps] == list(range(plan.num_steps))

    for epoch in range(plan.order.num_epoch):
        of_epoch = steps[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
        rows = np.concatenate([step.row_ids for step in of_epoch]).tolist()
        assert len(set(rows)) == len(rows) == plan.rows_per_epoch
        assert set(rows) <= set(range(plan.num_rows))
        assert all(len(step.row_ids) == plan.order.batch_size for step in of_epoch[:-1])
        assert of_epoch[-1].next_row == (epoch + 1) * plan.rows_per_epoch

    # The oracle: resume at every step.
    for i in range(len(steps)):
        resumed = steps_of(plan, steps[i].next_row)
        assert [(s.step, s.epoch, s.next_row, s.row_ids.tolist()) for s in resumed] == [
            (s.step, s.epoch, s.next_row, s.row_ids.tolist()) for s in steps[i + 1 :]
        ]


def test_golden_mixture() -> None:
    """Shares of 3 and 1 over sources of 5 and 3 rows: the first is repeated, the second cut."""
    mixed = {"batch_size": 4, "window_rows": 8, "weights": (0.75, 0.25)}
    assert rows_of(plan_of([2, 3], [3], **mixed)) == [[0, 1, 5, 2], [3, 4, 6, 0]]
    shuffled = plan_of([2, 3], [3], **mixed, shuffle=True, seed=42, num_epoch=2)
    assert rows_of(shuffled) == [[3, 1, 5, 2], [4, 0, 6, 3], [2, 0, 7, 4], [1, 1, 6, 0]]


def test_a_mixed_source_ends_before_it_repeats() -> None:
    plan = plan_of(
        [40, 60],
        [7],
        [30, 0, 3],
        weights=(5, 2, 3),
        batch_size=8,
        window_rows=16,
        shuffle=True,
        num_epoch=3,
    )

    rows = np.concatenate(rows_of(plan))
    assert len(rows) == 3 * plan.num_rows

    for begin, end in ((0, 100), (100, 107), (107, 140)):
        drawn = rows[(rows >= begin) & (rows < end)]
        passes = [drawn[i : i + end - begin].tolist() for i in range(0, len(drawn), end - begin)]
        assert all(sorted(rows) == list(range(begin, end)) for rows in passes[:-1])
        assert len(set(passes[-1])) == len(passes[-1])
        assert len({tuple(rows) for rows in passes}) == len(passes), (
            "each pass has an order of its own"
        )

    assert plan.source_passes(3 * plan.num_rows) == pytest.approx(
        [2.1, 12, 3 * 140 * 0.3 / 33], rel=0.02
    )


def test_a_mixture_ignores_the_row_groups() -> None:
    mixed = {"weights": (1, 1), "batch_size": 4, "window_rows": 64, "shuffle": True, "num_epoch": 2}
    assert rows_of(plan_of([20], [12], **mixed)) == rows_of(plan_of([5, 15], [3, 0, 9], **mixed))


def test_a_source_repeated_too_often_is_refused() -> None:
    with pytest.raises(ConfigError, match="repeat a source over 16,777,216 times"):
        plan_of([10**9], [1], weights=(1, 1), window_rows=64)


@pytest.mark.parametrize("shuffle", [True, False])
def test_how_far_a_row_travels(shuffle: bool) -> None:
    """A row of a set within one window moves as in any permutation: by a third of the set, on
    average.

    In a larger set the row groups are permuted over all of it, so that a row moves as far; but the
    rows of one group stay within about a window.
    """
    for window_rows in (20_000, 2_000):
        plan = plan_of([100] * 200, batch_size=50, window_rows=window_rows, shuffle=shuffle, seed=5)
        rows = np.concatenate(rows_of(plan))
        place = np.empty(len(rows), np.int64)
        place[rows] = np.arange(len(rows))
        travelled = np.abs(place - np.arange(len(rows))) / len(rows)
        apart = np.ptp(place.reshape(200, 100), axis=1) / len(rows)  # of the rows of a group

        if not shuffle:
            assert travelled.max() == 0
            continue

        assert travelled.mean() == pytest.approx(1 / 3, abs=0.03)
        assert np.mean(np.abs(np.diff(rows)) == 1) < 0.005 * 20_000 / window_rows, (
            "neighbours stay neighbours"
        )
        if window_rows == 20_000:
            assert apart.min() > 0.9
        else:
            assert np.median(apart) == pytest.approx(0.1, abs=0.02)
            assert apart.max() <= 0.2, "a group lies in two windows at the most"
