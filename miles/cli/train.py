"""`miles train`: a launch line -> a run, or its estimate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from miles.cli.console import Subparsers, open_console
from miles.common import patience
from miles.common.ctrl_c import on_ctrl_c
from miles.train.launch.parser import add_launch_flags

if TYPE_CHECKING:
    from miles.train.launch.arguments import LaunchLine

NAME = "train"


def add_parser(commands: Subparsers) -> None:
    """Add the command and its flags, for help and completion; `parse` reads them."""
    parser = commands.add_parser(
        NAME, help="fine-tune; flags have Miles's names (miles train --help)"
    )
    add_launch_flags(parser)


def run(words: Sequence[str], recipe: Sequence[str] = ()) -> None:
    """Train, or print the estimate of the run.

    Args:
        words: the line without `miles train`.
        recipe: a line whose flags hold where `words` say nothing else.
    """
    from miles.common.secret import hide_in_command_line
    from miles.train.launch.arguments import read_line
    from miles.train.launch.known_flags import secret_flags
    from miles.train.launch.notices import LOOKING

    hide_in_command_line(secret_flags())
    with patience.until_answered(LOOKING):
        _run(read_line(words, recipe=recipe))


def _run(line: LaunchLine) -> None:
    """Do what a launch line asks for."""
    config = line.config
    console = open_console()
    if config.dry_run:
        from miles.train.estimate.dry_run import dry_run

        with on_ctrl_c("stopped; a dry run starts and writes nothing"):
            dry_run(config, console, line.notices)
        return

    from miles.train.driver.finished import report_if_finished

    def report(text: str) -> None:
        console.print(f"  {text}", soft_wrap=True, markup=False, emoji=False)

    if report_if_finished(config, report):
        return

    # Ray is imported here: a run that is finished says so without it.
    patience.doing("loading Ray")
    from miles.train.driver.loop import train

    summary = train(config, console, line.notices)
    if not summary.num_steps:
        return
    report(
        f"{summary.num_steps} steps, loss {summary.first_loss:.4f} -> {summary.last_loss:.4f}, "
        f"{summary.tokens_seen:,} trained tokens; checkpoint {summary.checkpoint}"
    )
    if not summary.is_finished:
        report(
            f"stopped by {summary.stopped_by}; the same command goes on at step {summary.next_step}"
        )
