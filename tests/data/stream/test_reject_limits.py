"""Streaks of rejected rows across steps, and the share that a run bears."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from miles.data.stream.reject_limits import RejectLimits, Streak
from miles.data.types import Reject, StepRows


def step_of(is_rejected: list[bool], first_row: int = 0) -> StepRows:
    """A step with one row for each flag."""
    rejects = [
        Reject(first_row + position, 0, "too_long", "", position)
        for position, flag in enumerate(is_rejected)
        if flag
    ]
    return StepRows((len(is_rejected),), (0,), (0,), tuple(rejects))


def test_streak_goes_on_in_the_next_step() -> None:
    longest, streak = Streak().through(step_of([False, False, True, True]))
    assert longest == streak == Streak(2, 2, 3)
    longest, streak = streak.through(step_of([True, False, False, False], first_row=4))
    assert longest == Streak(3, 2, 4)
    assert streak == Streak()


def test_step_without_rows_leaves_the_streak() -> None:
    _, streak = Streak().through(step_of([True]))
    assert streak.through(step_of([])) == (Streak(), streak)


@given(st.lists(st.lists(st.booleans(), max_size=6), max_size=6))
def test_longest_streak_does_not_depend_on_steps(steps: list[list[bool]]) -> None:
    streak = Streak()
    longest = 0
    first_row = 0
    for flags in steps:
        in_step, streak = streak.through(step_of(flags, first_row))
        longest = max(longest, in_step.num_rows)
        first_row += len(flags)

    rows = "".join("x" if flag else "." for flags in steps for flag in flags)
    assert longest == max(map(len, rows.split(".")))


def test_rows_left_out_by_the_user_are_not_bad() -> None:
    left_out = [Reject(row, 0, "left_out_by_transform", "", row) for row in range(3)]
    step = StepRows((4,), (0,), (0,), (*left_out, Reject(3, 0, "too_long", "", 3)))
    assert RejectLimits.num_bad(step.rejects) == 1
    assert Streak().through(step) == (Streak(1, 3, 3), Streak(1, 3, 3))


def test_share_may_be_reached_but_not_exceeded() -> None:
    limits = RejectLimits(0.01)
    assert not limits.is_share_exceeded(10, 1_000)
    assert limits.is_share_exceeded(11, 1_000)
    assert not limits.is_share_exceeded(0, 0)


def test_only_fatal_reasons_end_the_run_by_themselves() -> None:
    rejects = step_of([True, False, True]).rejects
    assert RejectLimits(1.0).fatal(rejects) == []
    strict = RejectLimits(1.0, fatal_reasons=frozenset({"too_long"}))
    assert strict.fatal(rejects) == list(rejects)
