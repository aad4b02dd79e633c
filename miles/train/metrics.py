"""What a run says of itself: metrics.jsonl, the progress line, floating-point operations."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from miles import storage
from miles.architecture import ModelShape
from miles.data.stall import TRAINER, Stall, Timing
from miles.data.types import STAGES, StepReport
from miles.errors import ConfigError
from miles.train.step import StepResult

PROGRESS_STEPS = 20
"""So many of the last steps say in the progress line what keeps the run back."""


def step_metrics(
    report: StepReport,
    result: StepResult,
    source_names: Sequence[str],
    source_epochs: Sequence[float],
    tokens_seen: int,
    seconds: float,
    world_size: int,
    shape: ModelShape,
) -> dict[str, float | int | str]:
    """One line of metrics.jsonl.

    Args:
        source_epochs: how many times each source was gone through, this step included.
        tokens_seen: trained tokens so far, this step included.
        seconds: since the step before, waiting and logging included.
    """
    metrics: dict[str, float | int | str] = {
        "step": report.index,
        "sft/loss": result.loss,
        "sft/per_token_loss": result.loss,  # the loss is per token already; Miles logs both names
        "sft/tokens_seen": tokens_seen,
        "sft/epoch": round(report.epoch, 6),
        "sft/grad_norm": result.grad_norm,
        "sft/lr": result.lr,
        "data/prefetch_queue_depth": report.queue_depth,
        "data/wait_seconds": round(report.wait_seconds, 6),
        "data/pack_fill": round(report.pack_fill, 6),
        "data/dp_imbalance": round(report.dp_imbalance, 6),
        "data/num_rows": report.num_rows,
        "data/num_tokens": report.num_tokens,
        "data/straddling_tokens": report.num_straddling_tokens,
        "data/step_fingerprint": report.fingerprint,
        "perf/step_seconds": round(seconds, 6),
        "perf/tokens_per_second": round(report.num_tokens / seconds, 3),
        "perf/tflops_per_gpu": training_flops(shape, report) / seconds / world_size / 1e12,
    }
    for name, loss, tokens in zip(source_names, result.source_losses, result.source_tokens, strict=True):
        if tokens:
            metrics[f"sft/loss/{name}"] = loss / tokens
    if len(source_names) > 1:
        for name, rows, tokens, epochs in zip(
            source_names, report.source_rows, report.source_trained_tokens, source_epochs, strict=True
        ):
            metrics[f"data/num_rows/{name}"] = rows
            metrics[f"data/trained_tokens/{name}"] = tokens
            metrics[f"sft/epoch/{name}"] = round(epochs, 6)
    for stage, stage_seconds in report.stage_seconds.items():
        metrics[f"data/{stage}_seconds"] = round(stage_seconds, 6)
    reasons = [reject.reason for reject in report.rejects]
    metrics.update({f"data/rows_dropped/{reason}": reasons.count(reason) for reason in sorted(set(reasons))})
    if any(report.source_truncated):
        metrics["data/rows_truncated"] = sum(report.source_truncated)
    if result.skipped:
        metrics["sft/skipped"] = result.skipped
    return metrics


def timing_of(metrics: Mapping[str, Any]) -> Timing:
    """What a line of metrics.jsonl says of waiting."""
    return Timing(
        queue_depth=metrics["data/prefetch_queue_depth"],
        wait_seconds=metrics["data/wait_seconds"],
        step_seconds=metrics["perf/step_seconds"],
        stage_seconds={stage: metrics[f"data/{stage}_seconds"] for stage in STAGES},
    )


def training_flops(shape: ModelShape, report: StepReport) -> float:
    """Floating-point operations of a step, forward and backward (three times the forward).

    Two for each parameter of a matrix and token, embeddings not counted (the output layer is), plus attention
    over the causal half: 2 x 2 x tokens x mean context x heads x head size a layer, where the mean context of
    a segment of n tokens is n / 2. Source: Kaplan et al. 2020, section 2.1, with the causal half counted once.
    """
    heads = shape.num_attention_heads * shape.kv_channels
    groups = shape.num_query_groups * shape.kv_channels
    matrices = shape.num_layers * shape.hidden_size * (2 * heads + 2 * groups + 3 * shape.ffn_hidden_size)
    matrices += shape.hidden_size * shape.vocab_size
    mean_length = report.num_tokens / max(report.num_samples, 1)
    attention = 2.0 * shape.num_layers * heads * report.num_tokens * mean_length
    return 3.0 * (2.0 * matrices * report.num_tokens + attention)


class MetricsLog:
    """Appends to metrics.jsonl, and to TensorBoard where asked.

    Args:
        url: the run's folder. Remote: the file is kept in memory and written whole at each checkpoint.
        num_lines: of an existing file that are kept; what a killed run wrote beyond its checkpoint comes again.
    """

    def __init__(self, url: str, num_lines: int, *, tensorboard: bool = False) -> None:
        self._path = storage.join(url, "metrics.jsonl")
        old = storage.read_text(self._path).splitlines() if num_lines and storage.exists(self._path) else []
        self._lines = old[:num_lines]
        self._local = storage.is_local(url)
        storage.write_text(self._path, "".join(line + "\n" for line in self._lines))
        self._stream = open(storage.filesystem(self._path)[1], "a", buffering=1) if self._local else None  # noqa: SIM115
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError("--use-tensorboard needs its package: pip install miles[tensorboard]") from error
            self._board = SummaryWriter(storage.filesystem(storage.join(url, "tensorboard"))[1])

    @property
    def num_lines(self) -> int:
        return len(self._lines)

    def write(self, metrics: dict[str, float | int | str]) -> None:
        line = json.dumps({key: _finite(value) for key, value in metrics.items()})
        self._lines.append(line)
        if self._stream:
            self._stream.write(line + "\n")
        if self._board:
            for key, value in metrics.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._board.add_scalar(key, value, metrics["step"])

    def flush(self) -> None:
        if not self._stream:
            storage.write_text(self._path, "".join(line + "\n" for line in self._lines))

    def close(self) -> None:
        self.flush()
        if self._stream:
            self._stream.close()
        if self._board:
            self._board.close()


def _finite(value: float | int | str) -> float | int | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ProgressLine:
    """One line that a person watches: step, loss, rate, queue depth, tokens per second, time left."""

    def __init__(self, console: Console, num_steps: int, done: int) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("  training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=False,
        )
        self._task = self._progress.add_task("", total=num_steps, completed=done, text="")
        self._every = max(1, num_steps // 12)
        self._timings = deque[Timing](maxlen=PROGRESS_STEPS)
        self._progress.start()

    def update(self, metrics: dict[str, float | int | str]) -> None:
        self._timings.append(timing_of(metrics))
        stall = Stall.over(self._timings)
        waiting = "" if stall.limiting == TRAINER else f" (waiting {stall.waited_share:.0%}: {stall.limiting})"
        text = (
            f"loss {metrics['sft/loss']:.4f}  lr {metrics['sft/lr']:.2e}  "
            f"queue {metrics['data/prefetch_queue_depth']}{waiting}  {metrics['perf/tokens_per_second']:,.0f} tok/s"
        )
        self._progress.update(self._task, advance=1, text=text)
        if not self._console.is_terminal and int(metrics["step"]) % self._every == 0:
            self._console.print(f"  step {metrics['step']:>5}  epoch {metrics['sft/epoch']:.3f}  {text}")

    def say(self, text: str) -> None:
        self._progress.console.print(text)

    def stop(self) -> None:
        self._progress.stop()
