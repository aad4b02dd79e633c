"""Seconds from step to step, on a clock that the test turns."""

from __future__ import annotations

import pytest

from miles.train.driver import step_clock
from miles.train.driver.step_clock import StepClock


class HandTurnedTime:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> HandTurnedTime:
    time = HandTurnedTime()
    monkeypatch.setattr(step_clock, "time", time)
    return time


def test_a_lap_begins_where_the_last_ended(time: HandTurnedTime) -> None:
    clock = StepClock()
    for seconds in (2.0, 0.5, 3.0):
        time.now += seconds
        assert clock.lap() == seconds


def test_a_pause_is_left_out(time: HandTurnedTime) -> None:
    clock = StepClock()
    time.now += 1
    with clock.pause():
        time.now += 10
    time.now += 2
    assert clock.lap() == 3


def test_a_pause_within_a_pause_counts_once(time: HandTurnedTime) -> None:
    clock = StepClock()
    with clock.pause():
        time.now += 10
        with clock.pause():
            time.now += 20
        time.now += 5
    time.now += 2
    assert clock.lap() == 2


def test_a_pause_that_fails_is_over(time: HandTurnedTime) -> None:
    clock = StepClock()

    def fail() -> None:
        with clock.pause():
            time.now += 10
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    time.now += 2
    with clock.pause():
        time.now += 4
    assert clock.lap() == 2
