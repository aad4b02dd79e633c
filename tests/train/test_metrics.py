"""What a run says while it runs: the progress line names the queue's depth and what keeps the run back."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from miles.train.progress import ProgressLine


def line(step: int, depth: int, wait: float, encode: float) -> dict[str, Any]:
    return {
        "step": step,
        "sft/loss": 1.5,
        "sft/lr": 1e-5,
        "sft/epoch": 0.1,
        "data/prefetch_queue_depth": depth,
        "data/wait_seconds": wait,
        "data/read_seconds": 0.01,
        "data/normalize_seconds": 0.02,
        "data/encode_seconds": encode,
        "data/pack_seconds": 0.01,
        "sft/skipped_steps": 0,
        "perf/step_seconds": 1.0,
        "perf/tokens_per_second": 1234.0,
    }


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_progress_line_has_the_depth_and_the_limiting_stage(is_terminal: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=140, force_terminal=is_terminal, legacy_windows=False)
    progress = ProgressLine(console, 12, 0)
    for step in range(6):
        progress.update(line(step, 0, 0.9, 0.95))
    progress.stop()
    assert "queue 0 (waiting 90%: encode)" in screen.getvalue()
    screen.seek(0)
    screen.truncate()
    progress = ProgressLine(console, 12, 0)
    for step in range(6):
        progress.update(line(step, 8, 0.0, 0.2))
    progress.stop()
    assert "queue 8  1,234 tok/s" in screen.getvalue()
    assert "waiting" not in screen.getvalue()
