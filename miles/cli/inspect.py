"""`miles inspect`: the first batch of a run, coloured by its mask."""

from __future__ import annotations

import argparse

from miles.cli.console import Subparsers, open_console


def add_parser(commands: Subparsers) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "inspect", help="the first samples that a run trained on, coloured by their mask"
    )
    parser.add_argument("folder", metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--samples", type=int, default=3, metavar="N", help="how many (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> None:
    """Print the samples."""
    from miles.report.first_batch import inspect_run

    inspect_run(flags.folder, open_console(), flags.samples)
