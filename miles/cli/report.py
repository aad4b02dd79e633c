"""`miles report`: report.html and loss.png of a run."""

from __future__ import annotations

import argparse

from miles.cli.console import Subparsers, open_console, path_word
from miles.common.help_lines import explain

NAME = "report"


def add_parser(commands: Subparsers) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(NAME, help="report.html and loss.png of a run")
    explain(
        parser,
        "Write the page report.html and the picture loss.png into the folder of a run, also while "
        "it goes on. The page needs no network.",
        "report runs/qwen3",
    )
    parser.add_argument("folder", type=path_word, metavar="RUN", help="the run's folder")
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> None:
    """Write both files and print their paths."""
    from miles.report.report import write_report

    console = open_console()

    def tell(text: str) -> None:
        console.print(f"  {text}", soft_wrap=True)

    for path in write_report(flags.folder, notify=tell):
        tell(path)
