"""The metrics of a step and of an evaluation, and the progress line that names the bottleneck."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from miles.data.types import (
    STAGES,
    Reject,
    StepContent,
    StepPacking,
    StepPosition,
    StepReport,
    StepRows,
    StepTiming,
)
from miles.train.driver.metrics import (
    Metrics,
    RunConstants,
    RunTotals,
    eval_metrics,
    step_metrics,
)
from miles.train.driver.progress import ProgressLine
from miles.train.estimate.flops import training_flops
from miles.train.types import EvalSums, RouterStats, Skip, SkipReason, StepResult
from tests.support.shapes import HAND_COUNTED

REPORT = StepReport(
    position=StepPosition(index=4, epoch=0.5, next_row=80),
    rows=StepRows(
        read=(10, 6),
        truncated=(1, 0),
        held_out=(0, 1),
        rejects=(Reject(7, 0, "no_messages", ""),),
    ),
    content=StepContent(
        num_samples=14,
        num_tokens=500,
        num_causal_pairs=9_000,
        num_trained_tokens=300,
        source_trained_tokens=(200, 100),
        num_straddling_tokens=2,
        fingerprint="00ff",
    ),
    packing=StepPacking(fill=0.9, imbalance=1.1),
    timing=StepTiming(stage_seconds=dict.fromkeys(STAGES, 0.1), queue_depth=3),
)
RESULT = StepResult((400.0, 300.0), (200, 100), 1.5, 1e-5, 0.4)
TOTALS = RunTotals(source_epochs=(0.5, 0.5), tokens_seen=1500, num_skipped_steps=0)


def metrics_of(result: StepResult = RESULT, device: str | None = None) -> Metrics:
    """The metrics of a step that took half a second."""
    constants = RunConstants(("chat", "code"), HAND_COUNTED, world_size=2, device_name=device)
    return step_metrics(constants, REPORT, result, TOTALS, step_seconds=0.5)


def test_loss_by_source_and_speed() -> None:
    metrics = metrics_of()
    assert metrics["sft/loss"] == metrics["sft/per_token_loss"] == pytest.approx(700 / 300)
    assert (metrics["sft/loss/chat"], metrics["sft/loss/code"]) == (2.0, 3.0)
    assert metrics["perf/tokens_per_second"] == 1000
    assert metrics["perf/tflops_per_gpu"] == pytest.approx(
        training_flops(HAND_COUNTED, 500, 9_000) / 0.5 / 2 / 1e12
    )
    assert "perf/mfu" not in metrics


def test_mfu_needs_a_known_device() -> None:
    metrics = metrics_of(device="NVIDIA H100 80GB HBM3")
    assert metrics["perf/mfu"] == pytest.approx(float(metrics["perf/tflops_per_gpu"]) / 989)
    assert "perf/mfu" not in metrics_of(device="A card of another maker")


def test_the_evaluation_loss_is_weighted_by_tokens() -> None:
    metrics = eval_metrics(
        ("a", "b", "none"), EvalSums([40.0, 60.0, 0.0], [10, 30, 0]), seconds=1.25
    )
    assert metrics == {
        "eval/loss": 2.5,
        "eval/loss/a": 4.0,
        "eval/loss/b": 2.0,
        "eval/num_tokens": 40,
        "eval/seconds": 1.25,
    }


def test_the_balancing_loss_is_no_part_of_the_loss() -> None:
    """A dense model has no experts to show, and without balancing there is no loss of it."""
    dense = metrics_of()
    assert not [key for key in dense if "moe" in key]
    routed = metrics_of(replace(RESULT, router=RouterStats(max_load=1.5, entropy=1.0)))
    assert routed == {**dense, "sft/moe_max_load": 1.5, "sft/moe_load_entropy": 1.0}
    balanced = metrics_of(replace(RESULT, router=RouterStats(1.5, 1.0, aux_loss=2.25)))
    assert balanced == {**routed, "sft/moe_aux_loss": 2.25}


def generalized(key: str) -> str:
    """Return the key of the docs: `data/rows_dropped/no_messages` -> `…/<reason>`."""
    for stage in STAGES:
        if key == f"data/{stage}_seconds":
            return "data/<stage>_seconds"
    key = re.sub("/no_messages$", "/<reason>", key)
    return re.sub("/(chat|code)$", "/<source>", key)


def test_the_docs_name_every_key_and_no_other() -> None:
    text = (Path(__file__).parents[3] / "docs/metrics.md").read_text()
    documented = set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))
    routed = replace(RESULT, router=RouterStats(max_load=1.5, entropy=1.0, aux_loss=2.25))
    skipped = replace(routed, skip=Skip(SkipReason.LOSS_NOT_FINITE))
    metrics = metrics_of(skipped, "NVIDIA H200")
    metrics |= eval_metrics(("chat", "code"), EvalSums([1.0, 1.0], [1, 1]), seconds=1.0)
    general = {generalized(key) for key in metrics}
    assert general == documented


def line(step: int, depth: int, wait: float, encode: float) -> dict[str, Any]:
    return {
        "step": step,
        "sft/loss": 1.5,
        "sft/lr": 1e-5,
        "sft/epoch": 0.1,
        "sft/skipped_steps": 0,
        "data/prefetch_queue_depth": depth,
        "data/wait_seconds": wait,
        "data/read_seconds": 0.01,
        "data/normalize_seconds": 0.02,
        "data/encode_seconds": encode,
        "data/pack_seconds": 0.01,
        "perf/step_seconds": 1.0,
        "perf/tokens_per_second": 1234.0,
    }


def shown(lines: list[dict[str, Any]], *, is_terminal: bool, width: int = 140) -> str:
    screen = io.StringIO()
    screen.isatty = lambda: is_terminal  # type: ignore[method-assign]
    console = Console(file=screen, width=width, force_terminal=is_terminal, legacy_windows=False)
    progress = ProgressLine(console, 12, 0)
    for metrics in lines:
        progress.update(metrics)
    progress.stop()
    return screen.getvalue()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_line_names_the_bottleneck(is_terminal: bool) -> None:
    waiting = shown([line(step, 0, 0.9, 0.95) for step in range(6)], is_terminal=is_terminal)
    assert "queue 0 (waiting 90%: encode)" in waiting
    fed = shown([line(step, 8, 0.0, 0.2) for step in range(6)], is_terminal=is_terminal)
    assert "queue 8  1,234 tok/s" in fed
    assert "waiting" not in fed
    assert "eval" not in fed
    assert "skipped" not in fed


def test_a_narrow_terminal_shows_all_of_it() -> None:
    lines = [
        {**line(step, 0, 0.9, 0.95), "eval/loss": 1.25, "sft/skipped_steps": 2} for step in range(6)
    ]
    screen = shown(lines, is_terminal=True, width=80)
    text = " ".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen).split())
    for part in ("6/12", "eval 1.2500", "skipped 2"):
        assert part in text
    assert "…" not in text


def test_the_line_keeps_the_last_evaluation() -> None:
    lines = [line(step, 8, 0.0, 0.2) for step in range(6)]
    lines[2]["eval/loss"] = 1.25
    for later in lines[4:]:
        later["sft/skipped_steps"] = 2
    printed = shown(lines, is_terminal=False).splitlines()
    assert ["eval 1.2500" in text for text in printed[:6]] == [False] * 2 + [True] * 4
    assert ["skipped 2" in text for text in printed[:6]] == [False] * 4 + [True] * 2
