"""What a run says of each step: the keys of metrics.jsonl (docs/metrics.md has them all)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miles.architecture.config import ModelShape
from miles.data.stream.bottleneck import Timing
from miles.data.types import STAGES, StepReport
from miles.train.estimate.flops import peak_flops, training_flops
from miles.train.types import StepResult

Metrics = dict[str, float | int | str]
"""A line of metrics.jsonl."""


@dataclass(frozen=True)
class RunFacts:
    """What stays the same over a run."""

    source_names: tuple[str, ...]
    shape: ModelShape
    world_size: int
    device_name: str | None
    """of the GPU, where it computes in bfloat16; None: no MFU is known"""


@dataclass(frozen=True)
class Standing:
    """Where a run stands, a step included."""

    source_epochs: Sequence[float]
    """how many times each source was gone through"""
    tokens_seen: int
    """trained tokens so far"""
    num_skipped: int
    """steps that took no optimizer step, so far"""
    seconds: float
    """since the step before, waiting and logging included; evaluations and checkpoints not"""


def step_metrics(
    run: RunFacts, report: StepReport, result: StepResult, standing: Standing
) -> Metrics:
    """One line of metrics.jsonl."""
    operations = training_flops(
        run.shape, report.content.num_tokens, report.content.num_causal_pairs
    )
    flops_per_second = operations / standing.seconds / run.world_size
    metrics: Metrics = {
        "step": report.position.index,
        "sft/loss": result.loss,
        "sft/per_token_loss": result.loss,  # the loss is per token already; Miles logs both names
        "sft/tokens_seen": standing.tokens_seen,
        "sft/epoch": round(report.position.epoch, 6),
        "sft/grad_norm": result.grad_norm,
        "sft/lr": result.lr,
        "data/prefetch_queue_depth": report.timing.queue_depth,
        "data/wait_seconds": round(report.timing.wait_seconds, 6),
        "data/pack_fill": round(report.packing.fill, 6),
        "data/dp_imbalance": round(report.packing.imbalance, 6),
        "data/num_rows": report.rows.num_read,
        "data/num_tokens": report.content.num_tokens,
        "data/straddling_tokens": report.content.num_straddling_tokens,
        "data/step_fingerprint": report.content.fingerprint,
        "perf/step_seconds": round(standing.seconds, 6),
        "perf/tokens_per_second": round(report.content.num_tokens / standing.seconds, 3),
        "perf/train_seconds": round(result.seconds, 6),
        "perf/tflops_per_gpu": flops_per_second / 1e12,
        "sft/skipped_steps": standing.num_skipped,
    }
    peak = peak_flops(run.device_name) if run.device_name else None
    if peak is not None:
        metrics["perf/mfu"] = flops_per_second / peak
    for name, loss, tokens in zip(
        run.source_names, result.source_losses, result.source_tokens, strict=True
    ):
        if tokens:
            metrics[f"sft/loss/{name}"] = loss / tokens
    if len(run.source_names) > 1:
        for name, rows, tokens, epochs in zip(
            run.source_names,
            report.rows.read,
            report.content.source_trained_tokens,
            standing.source_epochs,
            strict=True,
        ):
            metrics[f"data/num_rows/{name}"] = rows
            metrics[f"data/trained_tokens/{name}"] = tokens
            metrics[f"sft/epoch/{name}"] = round(epochs, 6)
    for stage, stage_seconds in report.timing.stage_seconds.items():
        metrics[f"data/{stage}_seconds"] = round(stage_seconds, 6)
    reasons = [reject.reason for reject in report.rows.rejects]
    metrics.update(
        {f"data/rows_dropped/{reason}": reasons.count(reason) for reason in sorted(set(reasons))}
    )
    if report.rows.num_held_out:
        metrics["data/rows_held_out"] = report.rows.num_held_out
    if any(report.rows.truncated):
        metrics["data/rows_truncated"] = sum(report.rows.truncated)
    if result.skip is not None:
        metrics["sft/skipped"] = result.skip.reason.value
    return metrics


def eval_metrics(
    source_names: Sequence[str],
    source_losses: Sequence[float],
    source_tokens: Sequence[int],
    seconds: float,
) -> Metrics:
    """What an evaluation adds to its step's line.

    Args:
        source_losses: loss summed over each source's trained tokens.
        source_tokens: their number.
        seconds: that it took, answers included.
    """
    num_tokens = sum(source_tokens)
    metrics: Metrics = {
        "eval/loss": sum(source_losses) / num_tokens,
        "eval/num_tokens": num_tokens,
        "eval/seconds": round(seconds, 6),
    }
    for name, loss, tokens in zip(source_names, source_losses, source_tokens, strict=True):
        if tokens:
            metrics[f"eval/loss/{name}"] = loss / tokens
    return metrics


def timing_of(metrics: Mapping[str, Any]) -> Timing:
    """What a line of metrics.jsonl says of waiting."""
    return Timing(
        queue_depth=metrics["data/prefetch_queue_depth"],
        wait_seconds=metrics["data/wait_seconds"],
        step_seconds=metrics["perf/step_seconds"],
        stage_seconds={stage: metrics[f"data/{stage}_seconds"] for stage in STAGES},
    )
