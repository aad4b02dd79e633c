"""`miles demo`: the main job, end to end, on an embedded default."""

from __future__ import annotations

import argparse

from miles.cli.console import Subparsers, open_console, path_word
from miles.common.ctrl_c import on_ctrl_c
from miles.common.help_lines import explain

NAME = "demo"


def add_parser(commands: Subparsers) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(NAME, help="the main job, end to end, on an embedded default")
    explain(
        parser,
        "Run the main job from end to end on rows and a tiny model that come with miles: prepare, "
        "train, convert back, compare, report. It takes about a minute on two CPU cores, and needs "
        "no GPU and no network.",
        "demo",
        "demo --output /tmp/demo",
    )
    parser.add_argument(
        "--output",
        type=path_word,
        default="runs/demo",
        metavar="DIR",
        help="the run's folder; it is deleted and made again (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> None:
    """Run the demo."""
    from miles.demo.run import run_demo

    with on_ctrl_c(f"the demo is stopped; the same command deletes {flags.output} and begins anew"):
        run_demo(flags.output, open_console())
