"""The steps that are ready: any interleaving of requests, and what is measured of each step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.data.stream.ready_steps import ReadySteps
from miles.data.types import (
    StepContent,
    StepPacking,
    StepPosition,
    StepReport,
    StepRows,
    StepTiming,
)
from miles.errors import DataError, LostError, RunError


def report(step: int) -> StepReport:
    return StepReport(
        StepPosition(step, 0.0, step + 1),
        StepRows((1,), (0,), (0,), ()),
        StepContent(1, 1, 1, 1, (1,), 0, ""),
        StepPacking(1.0, 1.0),
        StepTiming({}),
    )


def put(ready: ReadySteps, first: int, count: int, now: float = 0.0) -> None:
    """Put a block whose content names its steps."""
    steps = range(first, first + count)
    ready.put([report(step) for step in steps], list(steps), now)


def two_ranks(first_step: int = 0) -> ReadySteps:
    return ReadySteps(first_step, 2, max_ready_steps=3, max_ahead_steps=5)


def timing(ready: ReadySteps, step: int) -> tuple[int, float]:
    measured = ready.commit(step).timing
    return measured.queue_depth, measured.wait_seconds


def test_depth_counts_up_to_the_bound() -> None:
    ready = two_ranks()
    put(ready, 0, 5)
    assert [ready.begin(step, 0.0) for step in range(5)] == [3, 3, 3, 2, 1]
    assert [timing(ready, step) for step in range(5)] == [(3, 0), (3, 0), (3, 0), (2, 0), (1, 0)]


def test_waited_step_has_depth_zero() -> None:
    ready = two_ranks()
    assert ready.begin(0, now=1.0) == 0
    assert not ready.is_measured(0)
    put(ready, 0, 1, now=1.5)
    assert ready.begin(0, now=2.0) is None, "a later rank changes nothing"
    assert timing(ready, 0) == (0, 0.5)


def test_fetching_ahead_measures_nothing() -> None:
    ready = two_ranks()
    assert ready.fetch(0, 0) is None
    put(ready, 0, 2)
    assert ready.fetch(0, 0) == [0, 1]
    assert not ready.is_measured(0)
    with pytest.raises(LostError, match="never begun"):
        ready.commit(0)


def test_chunk_is_released_after_all_ranks() -> None:
    ready = two_ranks()
    put(ready, 0, 2)
    put(ready, 2, 2)
    ready.fetch(0, 0)
    ready.begin(2, 0.0)
    assert ready.held_steps == [(0, 1), (2, 3)], "one rank has not fetched it"
    ready.fetch(1, 1)
    assert ready.held_steps == [(2, 3)]
    with pytest.raises(RunError, match="step 0 of the data stream is gone"):
        ready.fetch(0, 0)


def test_room_follows_the_needed_step() -> None:
    ready = two_ranks(first_step=10)
    assert ready.has_room
    assert (ready.may_load(14), ready.may_load(15)) == (True, False)
    put(ready, 10, 3)
    assert not ready.has_room
    ready.begin(10, 0.0)
    assert ready.has_room
    assert (ready.may_load(15), ready.may_load(16)) == (True, False)


def test_end_is_raised_beyond_the_newest_step() -> None:
    ready = two_ranks()
    put(ready, 0, 2)
    ready.end(DataError("no more"))
    assert ready.fetch(1, 0) == [0, 1]
    assert (ready.is_beyond_end(1), ready.is_beyond_end(2)) == (False, True)
    with pytest.raises(DataError, match="no more"):
        ready.fetch(2, 0)
    ready.begin(1, 0.0)
    assert timing(ready, 1) == (1, 0)
    with pytest.raises(DataError, match="no more"):
        ready.commit(2)


def test_only_needed_steps_become_overdue() -> None:
    ready = two_ranks()
    ready.fetch(3, 0)
    assert ready.overdue_step(1_000.0, 5.0) is None
    ready.begin(0, now=10.0)
    assert ready.overdue_step(14.0, 5.0) is None
    assert ready.overdue_step(15.0, 5.0) == 0


def test_blocks_come_in_order() -> None:
    ready = two_ranks()
    put(ready, 0, 1)
    with pytest.raises(AssertionError, match="step 2 came after step 0"):
        put(ready, 2, 1)


class Rank:
    """A trainer: it fetches one chunk ahead, and takes its steps one by one."""

    def __init__(self, ready: ReadySteps, number: int, num_steps: int) -> None:
        self.ready = ready
        self.number = number
        self.num_steps = num_steps
        self.in_hand: list[int] = []
        self.taken: list[int] = []

    @property
    def is_done(self) -> bool:
        return len(self.taken) == self.num_steps

    def fetch(self) -> None:
        step = self.in_hand[-1] + 1 if self.in_hand else len(self.taken)
        if step < self.num_steps:
            steps = self.ready.fetch(step, self.number)
            if steps is not None:
                self.in_hand += steps

    def take(self, now: float) -> None:
        if self.is_done:
            return
        self.ready.begin(len(self.taken), now)
        if self.in_hand:
            self.taken.append(self.in_hand.pop(0))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_interleaving_gives_each_step_once(data: st.DataObject) -> None:
    num_ranks = data.draw(st.integers(1, 3), label="ranks")
    block_sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=8), label="blocks")
    bound = data.draw(st.integers(1, 5), label="bound")
    num_steps = sum(block_sizes)
    ready = ReadySteps(0, num_ranks, max_ready_steps=bound, max_ahead_steps=bound)
    ranks = [Rank(ready, number, num_steps) for number in range(num_ranks)]
    blocks = list(block_sizes)
    now = 0.0
    committed = 0

    def put_next() -> None:
        if blocks and ready.has_room:
            put(ready, ready.newest + 1, blocks.pop(0), now)

    actions = [put_next]
    for rank in ranks:
        actions += [rank.fetch, lambda rank=rank: rank.take(now)]  # type: ignore[misc]

    while not all(rank.is_done for rank in ranks):
        now += 1.0
        drawn = data.draw(st.integers(0, len(actions) - 1)) if now < 60 else int(now) % len(actions)
        actions[drawn]()

        for rank in ranks:
            assert rank.taken == list(range(len(rank.taken))), "in order, each once"
        furthest = max(len(rank.taken) for rank in ranks)
        assert ready.newest - furthest < bound + max(block_sizes), "the bound, and one block"
        while committed < min(len(rank.taken) for rank in ranks):
            depth, wait_seconds = timing(ready, committed)
            assert 0 <= depth <= bound
            assert (depth == 0) == (wait_seconds > 0)
            committed += 1

    assert len(ready.held_steps) <= 1, "all that every rank has passed is released"
    assert committed == num_steps
