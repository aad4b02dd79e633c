"""The metrics of a step and of an evaluation: the keys of metrics.jsonl (docs/metrics.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miles.architecture.adapter import AdapterShape
from miles.architecture.config import ModelShape
from miles.data.stream.bottleneck import Timing
from miles.data.types import STAGES, StepReport
from miles.train.estimate.flops import peak_flops, training_flops
from miles.train.types import EvalSums, RouterStats, StepResult

Metrics = dict[str, float | int | str]
"""A line of metrics.jsonl."""


@dataclass(frozen=True)
class RunConstants:
    """The facts of a run that the metrics of every step are computed with."""

    source_names: tuple[str, ...]
    shape: ModelShape
    world_size: int
    device_name: str | None
    """name of the GPU if it computes in bfloat16; None: the MFU is not known"""
    adapter: AdapterShape | None = None
    """that alone is trained; None: all weights are"""


@dataclass(frozen=True)
class RunTotals:
    """The sums of a run up to a step, this step included."""

    source_epochs: Sequence[float]
    """how many times each source was read"""
    tokens_seen: int
    """trained tokens"""
    num_skipped_steps: int


def step_metrics(
    constants: RunConstants,
    report: StepReport,
    result: StepResult,
    totals: RunTotals,
    step_seconds: float,
) -> Metrics:
    """Return the metrics of a step: a line of metrics.jsonl.

    Args:
        report: of the stream, on the step's data.
        result: of the ranks, on the training.
        step_seconds: since the step before, waiting and logging included, evaluations and
            checkpoints not.
    """
    metrics: Metrics = {
        "step": report.position.index,
        "sft/loss": result.loss,
        "sft/per_token_loss": result.loss,  # Miles's recipe names both; ours is per token already
        "sft/tokens_seen": totals.tokens_seen,
        "sft/epoch": round(report.position.epoch, 6),
        "sft/grad_norm": result.grad_norm,
        "sft/lr": result.lr,
        "data/prefetch_queue_depth": report.timing.queue_depth,
        "data/wait_seconds": round(report.timing.wait_seconds, 6),
        "data/pack_fill": round(report.packing.fill, 6),
        "data/dp_imbalance": round(report.packing.imbalance, 6),
        "data/num_rows": report.rows.num_read,
        "data/num_samples": report.content.num_samples,
        "data/num_tokens": report.content.num_tokens,
        "data/straddling_tokens": report.content.num_straddling_tokens,
        "data/step_fingerprint": report.content.fingerprint,
        "perf/step_seconds": round(step_seconds, 6),
        "perf/tokens_per_second": round(report.content.num_tokens / step_seconds, 3),
        "perf/train_seconds": round(result.seconds, 6),
    }
    content = report.content
    operations = training_flops(
        constants.shape, content.num_tokens, content.num_causal_pairs, constants.adapter
    )
    flops_per_second = operations / step_seconds / constants.world_size
    metrics["perf/tflops_per_gpu"] = flops_per_second / 1e12
    metrics["sft/skipped_steps"] = totals.num_skipped_steps
    peak = peak_flops(constants.device_name) if constants.device_name else None
    if peak is not None:
        metrics["perf/mfu"] = flops_per_second / peak

    metrics |= _source_losses(
        "sft/loss", constants.source_names, result.source_losses, result.source_tokens
    )
    if len(constants.source_names) > 1:
        metrics |= _source_shares(constants.source_names, report, totals)
    for stage, stage_seconds in report.timing.stage_seconds.items():
        metrics[f"data/{stage}_seconds"] = round(stage_seconds, 6)
    metrics |= _unused_rows(report)
    if result.router is not None:
        metrics |= _router_stats(result.router)
    if result.skip is not None:
        metrics["sft/skipped"] = result.skip.reason.value
    return metrics


def eval_metrics(source_names: Sequence[str], sums: EvalSums, seconds: float) -> Metrics:
    """Return the metrics that an evaluation adds to the line of its step.

    Args:
        seconds: that it took, answers included.
    """
    num_tokens = sum(sums.source_tokens)
    metrics: Metrics = {
        "eval/loss": sum(sums.source_losses) / num_tokens,
        "eval/num_tokens": num_tokens,
        "eval/seconds": round(seconds, 6),
    }
    return metrics | _source_losses(
        "eval/loss", source_names, sums.source_losses, sums.source_tokens
    )


def timing_of(metrics: Mapping[str, Any]) -> Timing:
    """Return the part of a line of metrics.jsonl from which the bottleneck is found."""
    return Timing(
        queue_depth=metrics["data/prefetch_queue_depth"],
        wait_seconds=metrics["data/wait_seconds"],
        step_seconds=metrics["perf/step_seconds"],
        stage_seconds={stage: metrics[f"data/{stage}_seconds"] for stage in STAGES},
    )


def _source_losses(
    prefix: str, names: Sequence[str], losses: Sequence[float], tokens: Sequence[int]
) -> Metrics:
    """Return the mean loss of each source that has trained tokens.

    Args:
        losses: loss summed over each source's trained tokens.
        tokens: their number.
    """
    metrics: Metrics = {}
    for name, loss, num_tokens in zip(names, losses, tokens, strict=True):
        if num_tokens:
            metrics[f"{prefix}/{name}"] = loss / num_tokens
    return metrics


def _source_shares(names: Sequence[str], report: StepReport, totals: RunTotals) -> Metrics:
    """Return the part of each source in a step, and how often the source was read."""
    metrics: Metrics = {}
    for index, name in enumerate(names):
        metrics[f"data/num_rows/{name}"] = report.rows.read[index]
        metrics[f"data/trained_tokens/{name}"] = report.content.source_trained_tokens[index]
        metrics[f"sft/epoch/{name}"] = round(totals.source_epochs[index], 6)
    return metrics


def _router_stats(router: RouterStats) -> Metrics:
    """Return how evenly the experts were loaded, and the loss that balances them, where any."""
    metrics: Metrics = {
        "sft/moe_max_load": router.max_load,
        "sft/moe_load_entropy": router.entropy,
    }
    if router.aux_loss is not None:
        metrics["sft/moe_aux_loss"] = router.aux_loss
    return metrics


def _unused_rows(report: StepReport) -> Metrics:
    """Return the numbers of rows that were dropped by reason, held out, or cut; none that is 0."""
    metrics: Metrics = {}
    num_dropped = Counter(reject.reason for reject in report.rows.rejects)
    for reason in sorted(num_dropped):
        metrics[f"data/rows_dropped/{reason}"] = num_dropped[reason]
    if report.rows.num_held_out:
        metrics["data/rows_held_out"] = report.rows.num_held_out
    if any(report.rows.truncated):
        metrics["data/rows_truncated"] = sum(report.rows.truncated)
    return metrics
