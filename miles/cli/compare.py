"""`miles compare`: runs beside one another: their data, their settings, their losses."""

from __future__ import annotations

import argparse
import json

from miles.cli.console import Subparsers, open_console, path_word
from miles.common.counts import counted
from miles.common.ctrl_c import on_ctrl_c
from miles.common.help_lines import explain
from miles.common.patience import until_answered
from miles.errors import ConfigError, MilesError

NAME = "compare"
_EXAMPLES = (
    "compare runs/a runs/b",
    "compare runs/lr-1e-5 runs/lr-2e-5 runs/lr-5e-5 --json comparison.json",
)


class NothingInCommonError(MilesError):
    """Runs whose losses have neither a step nor a number of tokens in common."""

    exit_status = 1


def add_parser(commands: Subparsers) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        NAME,
        help="did runs see the same data, up to which step; their settings and losses",
    )
    explain(
        parser,
        "Compare runs with the first of them: by the fingerprint of each step, whether "
        "they saw the same rows and tokens, and up to which step; the settings that differ; the "
        "losses at common steps, or at common tokens. The exit status is 1 where the losses have "
        "nothing in common.",
        *_EXAMPLES,
    )
    parser.add_argument(
        "runs",
        type=path_word,
        nargs="+",
        metavar="RUN",
        help="folders of runs, two or more: --output-dir, or --save",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="also write the comparison as JSON; -: print only that"
    )
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> None:
    """Print the comparison.

    Raises:
        MilesError: a folder that is no run's, or runs with nothing in common.
    """
    with until_answered("looking at the runs"), on_ctrl_c("stopped"):
        from miles.common import storage
        from miles.common.first_contact import first_contact
        from miles.common.local_paths import absolute
        from miles.common.prose import Prose
        from miles.common.screen import Screen
        from miles.compare.comparison import compare
        from miles.compare.runs import read_run
        from miles.compare.text import MOST_RUNS, lines_of

        if not 2 <= len(flags.runs) <= MOST_RUNS:
            raise ConfigError(f"{counted(len(flags.runs), 'run')}: give from two to {MOST_RUNS}")
        screen = Screen(stderr=True, highlight=False, markup=False, emoji=False)
        with first_contact():
            runs = [
                read_run(
                    folder, lambda text: screen.print(Prose(text), soft_wrap=True, style="dim")
                )
                for folder in flags.runs
            ]
        comparison = compare(runs)

    text = json.dumps(comparison.to_json(), indent=1, ensure_ascii=False)
    if flags.json == "-":
        print(text)
    else:
        console = open_console()
        for line in lines_of(comparison):
            console.print(Prose(line), soft_wrap=True)
        if flags.json:
            storage.write_text(absolute(flags.json), text + "\n")

    if not comparison.is_comparable:
        raise NothingInCommonError(
            "the losses of these runs cannot be compared: they have neither a step nor a number of "
            "trained tokens in common"
        )
