"""What a run says while it runs: the keys of a step, and a progress line that names what keeps the run back."""

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
from miles.train.driver.metrics import RunFacts, Standing, eval_metrics, step_metrics
from miles.train.driver.progress import ProgressLine
from miles.train.estimate.flops import training_flops
from miles.train.types import Skip, SkipReason, StepResult
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
STANDING = Standing(source_epochs=(0.5, 0.5), tokens_seen=1500, num_skipped=0, seconds=0.5)


def facts(device: str | None = None) -> RunFacts:
    return RunFacts(("chat", "code"), HAND_COUNTED, world_size=2, device_name=device)


def test_a_step_says_its_loss_by_source_and_its_speed() -> None:
    metrics = step_metrics(facts(), REPORT, RESULT, STANDING)
    assert metrics["sft/loss"] == metrics["sft/per_token_loss"] == pytest.approx(700 / 300)
    assert (metrics["sft/loss/chat"], metrics["sft/loss/code"]) == (2.0, 3.0)
    assert metrics["perf/tokens_per_second"] == 1000
    assert metrics["perf/tflops_per_gpu"] == pytest.approx(
        training_flops(HAND_COUNTED, 500, 9_000) / 0.5 / 2 / 1e12
    )
    assert "perf/mfu" not in metrics


def test_mfu_is_said_where_the_device_is_known() -> None:
    metrics = step_metrics(facts("NVIDIA H100 80GB HBM3"), REPORT, RESULT, STANDING)
    assert metrics["perf/mfu"] == pytest.approx(float(metrics["perf/tflops_per_gpu"]) / 989)
    assert "perf/mfu" not in step_metrics(
        facts("A card of another maker"), REPORT, RESULT, STANDING
    )


def test_the_evaluation_loss_is_weighted_by_tokens() -> None:
    metrics = eval_metrics(("a", "b", "none"), (40.0, 60.0, 0.0), (10, 30, 0), 1.25)
    assert metrics == {
        "eval/loss": 2.5,
        "eval/loss/a": 4.0,
        "eval/loss/b": 2.0,
        "eval/num_tokens": 40,
        "eval/seconds": 1.25,
    }


def test_the_docs_name_every_key_and_no_other() -> None:
    text = (Path(__file__).parents[3] / "docs/metrics.md").read_text()
    documented = set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))
    skipped = replace(RESULT, skip=Skip(SkipReason.LOSS_NOT_FINITE))
    said = {
        **step_metrics(facts("NVIDIA H200"), REPORT, skipped, STANDING),
        **eval_metrics(("chat", "code"), (1.0, 1.0), (1, 1), 1.0),
    }
    general = {
        re.sub(r"/(chat|code)$", "/<source>", re.sub(r"/no_messages$", "/<reason>", key)).replace(
            next((f"data/{stage}_" for stage in STAGES if key == f"data/{stage}_seconds"), "\0"),
            "data/<stage>_",
        )
        for key in said
    }
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
    console = Console(file=screen, width=width, force_terminal=is_terminal, legacy_windows=False)
    progress = ProgressLine(console, 12, 0)
    for metrics in lines:
        progress.update(metrics)
    progress.stop()
    return screen.getvalue()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_progress_line_has_the_depth_and_the_limiting_stage(is_terminal: bool) -> None:
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
    said = " ".join(
        re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(lines, is_terminal=True, width=80)).split()
    )
    for part in ("6/12", "eval 1.2500", "skipped 2"):
        assert part in said
    assert "…" not in said


def test_the_progress_line_keeps_the_last_evaluation_and_counts_skipped_steps() -> None:
    lines = [line(step, 8, 0.0, 0.2) for step in range(6)]
    lines[2]["eval/loss"] = 1.25
    for later in lines[4:]:
        later["sft/skipped_steps"] = 2
    text = shown(lines, is_terminal=False).splitlines()
    assert ["eval 1.2500" in said for said in text[:6]] == [False, False, True, True, True, True]
    assert ["skipped 2" in said for said in text[:6]] == [False] * 4 + [True] * 2
