"""`miles train`: a launch line -> a run, or its estimate."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from miles.cli.console import Subparsers, open_console
from miles.common import patience
from miles.common.help_lines import explain
from miles.common.redact import redact
from miles.train.launch.parser import EXAMPLES, SENTENCE, add_launch_flags

NAME = "train"


def add_parser(commands: Subparsers) -> None:
    """Add the command and its flags, for help and completion; `parse` reads them."""
    parser = commands.add_parser(
        NAME, help="fine-tune; flags have Miles's names (miles train --help)"
    )
    explain(parser, SENTENCE, *EXAMPLES)
    add_launch_flags(parser)


def run(words: Sequence[str], recipe: Sequence[str] = ()) -> None:
    """Train, or print the estimate of the run.

    Args:
        words: the line without `miles train`.
        recipe: a line whose flags hold where `words` say nothing else.
    """
    from miles.common.secret import hide_in_command_line
    from miles.train.driver.command import carry_out
    from miles.train.launch.arguments import read_line
    from miles.train.launch.known_flags import secret_flags
    from miles.train.launch.notices import LOOKING

    hide_in_command_line(secret_flags())
    with patience.until_answered(LOOKING):
        console = open_console()
        line = read_line(words, recipe=recipe)
        summary = carry_out(line, console)
    if summary is not None and summary.num_steps:
        command = shlex.join(["miles", "report", redact(line.config.run_dir)])
        console.print(f"  to see its page: {command}", soft_wrap=True)
