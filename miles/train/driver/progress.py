"""The line that a person watches: step, loss, rate, queue depth, tokens per second, time left."""

from __future__ import annotations

from collections import deque

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from miles.data.stream.bottleneck import TRAINER, Stall, Timing
from miles.train.driver.metrics import Metrics, timing_of

PROGRESS_STEPS = 20
"""So many of the last steps say in the progress line what keeps the run back."""
WIDE = 120
"""Columns of a terminal that has room for a bar."""


class ProgressLine:
    """One line that a person watches: step, loss, rate, queue depth, tokens per second, time left."""

    def __init__(self, console: Console, num_steps: int, done: int) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("  training"),
            *([BarColumn(bar_width=24)] if console.width >= WIDE else []),
            MofNCompleteColumn(),
            TextColumn(
                "{task.fields[text]}", table_column=Column()
            ),  # the one that wraps where there is no room
            TimeRemainingColumn(compact=True),
            console=console,
            transient=False,
        )
        self._task = self._progress.add_task("", total=num_steps, completed=done, text="")
        self._every = max(1, num_steps // 12)
        self._timings = deque[Timing](maxlen=PROGRESS_STEPS)
        self._eval = ""  # the last evaluation's loss
        self._progress.start()

    def update(self, metrics: Metrics) -> None:
        self._timings.append(timing_of(metrics))
        stall = Stall.over(self._timings)
        waiting = (
            ""
            if stall.limiting == TRAINER
            else f" (waiting {stall.waited_share:.0%}: {stall.limiting})"
        )
        if "eval/loss" in metrics:
            self._eval = f"eval {metrics['eval/loss']:.4f}  "
        text = (
            f"loss {metrics['sft/loss']:.4f}  {self._eval}lr {metrics['sft/lr']:.2e}  "
            f"queue {metrics['data/prefetch_queue_depth']}{waiting}  {metrics['perf/tokens_per_second']:,.0f} tok/s"
        )
        if metrics["sft/skipped_steps"]:
            text += f"  skipped {metrics['sft/skipped_steps']}"
        self._progress.update(self._task, advance=1, text=text)
        if not self._console.is_terminal and int(metrics["step"]) % self._every == 0:
            self._console.print(
                f"  step {metrics['step']:>5}  epoch {metrics['sft/epoch']:.3f}  {text}",
                soft_wrap=True,
            )

    def stop(self) -> None:
        self._progress.stop()
