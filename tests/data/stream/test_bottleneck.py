"""What is said to keep a run back, from what was waited for."""

from __future__ import annotations

import re

import pytest

from miles.data.stream.bottleneck import Bottleneck, Timing

BUSY = {"read": 0.1, "normalize": 0.2, "encode": 0.6, "pack": 0.05}
IDLE = {stage: seconds / 10 for stage, seconds in BUSY.items()}


@pytest.mark.parametrize(
    ("timing", "limiting", "said"),
    [
        (
            Timing(4, 0.0, 1.0, BUSY),
            "trainer",
            "queue was empty at 0 of 10 steps. The loader keeps up",
        ),
        (
            Timing(0, 0.9, 1.0, BUSY),
            "encode",
            r"waited 9\.00 s of 10\.0 s .* stage encode .*raise --loader-cpus",
        ),
        (Timing(0, 0.9, 1.0, {**BUSY, "read": 0.7}), "read", "stage read .*miles prepare"),
        (Timing(0, 0.9, 1.0, IDLE), "ray", "stages were not busy: .*stood idle"),
        (
            Timing(0, 0.01, 1.0, IDLE),
            "trainer",
            "The loader keeps up",
        ),  # hardly anything was waited
    ],
)
def test_what_limits(timing: Timing, limiting: str, said: str) -> None:
    stall = Bottleneck.over([timing] * 10)
    assert stall.limiting == limiting
    assert re.search(said, str(stall))


def test_waiting_is_weighed_by_seconds() -> None:
    kept_up, waited = Timing(4, 0.0, 1.0, IDLE), Timing(0, 0.5, 1.0, BUSY)
    assert Bottleneck.over([kept_up] * 99 + [waited]).limiting == "trainer"
    assert Bottleneck.over([waited] * 9 + [kept_up]).limiting == "encode"


def test_of_nothing_nothing_is_said() -> None:
    assert Bottleneck.over([]).limiting == "trainer"
    assert "0 of 0 steps" in str(Bottleneck.over([]))
