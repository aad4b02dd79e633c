"""Made-up metrics of small runs, for the report."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def metrics_line(step: int, loss: float | None, **more: float | None) -> dict[str, Any]:
    """Return one line of metrics.jsonl; None is a number that is not finite."""
    stages = ("read", "normalize", "encode", "pack")
    return {
        "step": step,
        "sft/loss": loss,
        "sft/loss/chat": loss,
        "sft/epoch": step / 4,
        "sft/tokens_seen": 1_000 * (step + 1),
        "sft/skipped_steps": 0,
        "data/prefetch_queue_depth": 4,
        "data/wait_seconds": 0.0,
        **{f"data/{stage}_seconds": 0.1 for stage in stages},
        "data/num_tokens": 3_000,
        "perf/step_seconds": 2.0 + step,
        "perf/tokens_per_second": 1_500.0,
        **more,
    }


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write a file of JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


PLAIN_RUN = [metrics_line(step, 2.0 - step / 4) for step in range(4)]

EVALUATED_RUN = [
    metrics_line(0, None, **{"perf/mfu": 0.1}),
    metrics_line(
        1,
        1.75,
        **{"perf/mfu": 0.4, "eval/loss": 1.9, "eval/loss/chat": 1.8, "eval/loss/code": 2.0},
    ),
    metrics_line(
        2,
        1.5,
        **{"perf/mfu": 0.5, "eval/loss": None, "eval/loss/chat": 1.7, "eval/loss/code": None},
    ),
    metrics_line(
        3,
        1.25,
        **{"perf/mfu": 0.3, "eval/loss": 1.625, "eval/loss/chat": 1.5, "sft/skipped_steps": 1},
    ),
]
"""A run with evaluations, a loss that is not finite, a skipped step. `code` is only evaluated."""
