"""A launch line, carried out: its estimate, a word on a finished run, or training.

LaunchLine -> dry run | "this run is finished: …" | `loop.train` -> the last sentence

`miles train` and `miles.train.run` both end here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles.common import patience
from miles.common.counts import counted
from miles.common.ctrl_c import on_ctrl_c
from miles.train.launch.arguments import LaunchLine

if TYPE_CHECKING:
    from rich.console import Console

    from miles.train.driver.run import RunSummary


def carry_out(line: LaunchLine, console: Console) -> RunSummary | None:
    """Train, or print the estimate of a dry run.

    Returns:
        how the run ended; None where nothing was started: a dry run, or a run that is finished.

    Raises:
        MilesError: what cannot be run, or ended the run.
    """
    config = line.config
    if config.dry_run:
        from miles.train.estimate.dry_run import dry_run

        with on_ctrl_c("stopped; a dry run starts and writes nothing"):
            dry_run(config, console, line.notices)
        return None

    from miles.common.prose import Prose
    from miles.train.driver.finished import report_if_finished

    def report(text: str) -> None:
        console.print(Prose(f"  {text}"), soft_wrap=True)

    if report_if_finished(config, report):
        return None

    # Ray is imported here: a run that is finished says so without it.
    patience.doing("loading Ray")
    from miles.train.driver.loop import train

    summary = train(config, console, line.notices)
    if not summary.num_steps:
        return summary
    report(
        f"{counted(summary.num_steps, 'step')}, loss {summary.first_loss:.4f} -> "
        f"{summary.last_loss:.4f}, {counted(summary.tokens_seen, 'trained token')}; checkpoint "
        f"{summary.checkpoint}"
    )
    if not summary.is_finished:
        report(
            f"stopped by {summary.stopped_by}; the same command goes on at step {summary.next_step}"
        )
    return summary
