"""The line that a person watches: steps, loss, queue depth, tokens per second, time left."""

from __future__ import annotations

from collections import deque

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from miles.data.stream.bottleneck import TRAINER, Bottleneck, Timing
from miles.train.driver.metrics import Metrics, timing_of

PROGRESS_STEPS = 20
"""Number of latest steps from which the bottleneck in the line is found."""
WIDE = 120
"""Columns of a terminal that has room for a bar."""


class ProgressLine:
    """Shows the progress of a run on a terminal. Elsewhere it prints about twelve lines a run.

    Args:
        num_steps: of the whole run.
        num_done: steps completed before.
    """

    def __init__(self, console: Console, num_steps: int, num_done: int) -> None:
        self._console = console
        bar = [BarColumn(bar_width=24)] if console.width >= WIDE else []
        self._progress = Progress(
            TextColumn("  training"),
            *bar,
            MofNCompleteColumn(),
            # The column that wraps where there is no room.
            TextColumn("{task.fields[text]}", table_column=Column(), markup=False),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=False,
        )

        self._task = self._progress.add_task("", total=num_steps, completed=num_done, text="")
        self._interval = max(1, num_steps // 12)
        self._timings = deque[Timing](maxlen=PROGRESS_STEPS)
        self._eval_text = ""
        self._progress.start()

    def update(self, metrics: Metrics) -> None:
        """Show a step."""
        self._timings.append(timing_of(metrics))
        if "eval/loss" in metrics:
            self._eval_text = f"eval {metrics['eval/loss']:.4f}  "
        text = self._text(metrics)

        self._progress.update(self._task, advance=1, text=text)
        if not self._console.is_terminal and int(metrics["step"]) % self._interval == 0:
            self._console.print(
                f"  step {metrics['step']:>5}  epoch {metrics['sft/epoch']:.3f}  {text}",
                soft_wrap=True,
            )

    def stop(self) -> None:
        """Leave the line as it is, and give the terminal back."""
        self._progress.stop()

    def _text(self, metrics: Metrics) -> str:
        stall = Bottleneck.over(self._timings)
        waiting = ""
        if stall.limiting != TRAINER:
            waiting = f" (waiting {stall.waited_share:.0%}: {stall.limiting})"
        text = (
            f"loss {metrics['sft/loss']:.4f}  {self._eval_text}lr {metrics['sft/lr']:.2e}  "
            f"queue {metrics['data/prefetch_queue_depth']}{waiting}  "
            f"{metrics['perf/tokens_per_second']:,.0f} tok/s"
        )
        if metrics["sft/skipped_steps"]:
            text += f"  skipped {metrics['sft/skipped_steps']}"
        return text
