"""The progress of a run on a terminal, and where no line can change."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from miles.data.types import STAGES
from miles.train.driver.progress import ProgressLine


def step(number: int, *, queue: int = 8, waited: float = 0.0) -> dict[str, Any]:
    return {
        "step": number,
        "sft/loss": 2.0,
        "sft/lr": 1e-3,
        "sft/epoch": 0.5,
        "sft/skipped_steps": 0,
        "data/prefetch_queue_depth": queue,
        "data/wait_seconds": waited,
        "perf/step_seconds": 1.0 + waited,
        "perf/tokens_per_second": 1000.0,
        **{f"data/{stage}_seconds": 0.01 for stage in STAGES},
    }


def printed(num_steps: int, step_seconds: float) -> list[str]:
    """Return the lines of a run into a file, whose steps take so long."""
    screen, clock = io.StringIO(), [0.0]
    line = ProgressLine(Console(file=screen, width=80), num_steps, 0, now=lambda: clock[0])
    for number in range(num_steps):
        clock[0] += step_seconds
        line.update(step(number))
    line.stop()
    assert "\r" not in screen.getvalue()
    assert "\x1b" not in screen.getvalue()
    return screen.getvalue().splitlines()


@pytest.mark.parametrize("variable", ["", "FORCE_COLOR"])
def test_a_file_gets_whole_lines(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    if variable:
        monkeypatch.setenv(variable, "1")
    lines = printed(120, 0.01)
    assert [line.split()[1] for line in lines] == [*map(str, range(0, 120, 10)), "119"]
    assert all(line.endswith("1,000 tok/s") for line in lines)


def test_slow_steps_are_printed_by_time() -> None:
    assert len(printed(24, 40.0)) == 24, "each takes longer than the longest silence"
    minutes = printed(1_000, 6.0)
    assert 30 < len(minutes) < 200
    days = printed(20_000, 20.0)
    assert 100 < len(days) < 800


def test_the_start_is_no_bottleneck() -> None:
    screen = io.StringIO()
    line = ProgressLine(Console(file=screen, width=80), 12, 0)
    line.update(step(0, queue=0, waited=30.0))
    line.update(step(1))
    assert "waiting" not in screen.getvalue()

    line.update(step(2, queue=0, waited=1.0))
    assert "queue 0 (waiting 33%: ray)" in screen.getvalue()
    for number in range(3, 8):
        line.update(step(number))
    assert "waiting" not in screen.getvalue().splitlines()[-1], "the queue is full again"
