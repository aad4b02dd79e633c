"""The line that a person watches: steps, loss, queue depth, tokens per second, time left."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from miles.common import patience
from miles.common.progress import is_notebook, progress
from miles.common.prose import Prose
from miles.common.screen import is_live
from miles.data.stream.bottleneck import TRAINER, Bottleneck, Timing
from miles.train.driver.metrics import Metrics, timing_of

PROGRESS_STEPS = 20
"""Number of latest steps from which the bottleneck in the line is found."""
LATELY = 5
"""A full queue at as many steps in a row is no waiting, whatever was before."""
PRINTED_STEPS = 12
"""Steps of a run that are printed, at least, where no line can change."""
PRINT_SECONDS = 30.0
"""The longest silence there, at first."""
FIRST_STEP = "reading the first block of rows"
"""The work until the first step is there."""
WIDE = 120
"""Columns of a terminal that has room for a bar."""


class ProgressLine:
    """Shows the progress of a run: one line that changes, on a terminal and in a notebook.

    Elsewhere, a line is printed now and then.

    Args:
        num_steps: of the whole run.
        num_done: steps completed before.
        now: the seconds on a clock.
    """

    def __init__(
        self,
        console: Console,
        num_steps: int,
        num_done: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._num_steps = num_steps
        self._num_done = num_done
        self._interval = max(1, num_steps // PRINTED_STEPS)
        self._timings = deque[Timing](maxlen=PROGRESS_STEPS)
        self._has_begun = False
        self._eval_text = ""

        self._now = now
        self._begun = self._printed = now()
        patience.answered()
        self._bar = _open_bar(console, num_steps, num_done)
        if self._bar is None:
            patience.doing(FIRST_STEP)

    def update(self, metrics: Metrics) -> None:
        """Show a step."""
        patience.answered()
        # The first step waits for the start of the loaders: that is no bottleneck.
        if self._has_begun:
            self._timings.append(timing_of(metrics))
        self._has_begun = True
        if "eval/loss" in metrics:
            self._eval_text = f"eval {metrics['eval/loss']:.4f}  "

        self._num_done += 1
        text = self._text(metrics)
        if self._bar is not None:
            self._bar.update(self._num_done, text)
        elif self._is_due(int(metrics["step"])):
            self._printed = self._now()
            line = f"  step {metrics['step']:>5}  epoch {metrics['sft/epoch']:.3f}  {text}"
            self._console.print(Prose(line), soft_wrap=True)

    def stop(self) -> None:
        """Leave the line as it is, and give the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def _is_due(self, step: int) -> bool:
        """Return whether a step is printed where no line can change: about twelve steps of a run.

        Where steps are slow, there are more: one after 30 seconds, later after a hundredth of the
        time since the start, so that a run of days prints some hundreds.
        """
        if step % self._interval == 0 or self._num_done == self._num_steps:
            return True
        now = self._now()
        pause = max(PRINT_SECONDS, (now - self._begun) / 100)
        return now - self._printed >= pause

    def _text(self, metrics: Metrics) -> str:
        stall = Bottleneck.over(self._timings)
        waiting = ""
        has_waited_lately = any(timing.queue_depth == 0 for timing in list(self._timings)[-LATELY:])
        if has_waited_lately and stall.limiting != TRAINER:
            waiting = f" (waiting {stall.waited_share:.0%}: {stall.limiting})"
        text = (
            f"loss {metrics['sft/loss']:.4f}  {self._eval_text}lr {metrics['sft/lr']:.2e}  "
            f"queue {metrics['data/prefetch_queue_depth']}{waiting}  "
            f"{metrics['perf/tokens_per_second']:,.0f} tok/s"
        )
        if metrics["sft/skipped_steps"]:
            text += f"  skipped {metrics['sft/skipped_steps']}"
        return text


class Bar(Protocol):
    """A line that changes in place."""

    def update(self, num_done: int, text: str) -> None:
        """Show how many steps are done, and a text behind them."""

    def stop(self) -> None:
        """Leave the line as it is."""


def _open_bar(console: Console, num_steps: int, num_done: int) -> Bar | None:
    """Return the line for a terminal or a notebook; None where no line can change."""
    if is_live(console):
        return _TerminalBar(console, num_steps, num_done)
    return _NotebookBar(num_steps, num_done) if is_notebook() else None


class _TerminalBar:
    """A line at the foot of a terminal."""

    def __init__(self, console: Console, num_steps: int, num_done: int) -> None:
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
        self._task = self._progress.add_task(
            "", total=num_steps, completed=num_done, text=FIRST_STEP
        )
        self._progress.start()

    def update(self, num_done: int, text: str) -> None:
        """Show how many steps are done, and a text behind them."""
        self._progress.update(self._task, completed=num_done, text=text)

    def stop(self) -> None:
        """Leave the line as it is, and give the terminal back."""
        self._progress.stop()


class _NotebookBar:
    """A line below the cell that runs. Its steps are those of this attempt, as is the time left."""

    def __init__(self, num_steps: int, num_done: int) -> None:
        text = f"training from step {num_done:,}" if num_done else "training"
        self._first = num_done
        self._shown = contextlib.ExitStack()
        self._bar = self._shown.enter_context(progress(text, num_steps - num_done, unit="steps"))

    def update(self, num_done: int, text: str) -> None:
        """Show how many steps are done, and a text behind them."""
        self._bar.num_done = num_done - self._first
        self._bar.note(" · ".join(text.split("  ")))

    def stop(self) -> None:
        """Take the line away: the result has the numbers."""
        self._shown.close()
