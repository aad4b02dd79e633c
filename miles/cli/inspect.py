"""`miles inspect`: the first batch of a run, its trained tokens marked.

Ids and masks are those that the run kept, so its own settings are in them; they are printed as the
flags that show the same in `miles prepare` and `miles certify`.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping

from miles.cli.console import Subparsers, open_console, path_word
from miles.common.flags import words_of
from miles.common.help_lines import explain
from miles.data.config import EncodeConfig
from miles.errors import SourceError


def add_parser(commands: Subparsers) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "inspect", help="the first samples that a run trained on, their trained tokens marked"
    )
    explain(
        parser,
        "Show the samples of the first step of a run, with the tokens that were trained marked.",
        "inspect runs/chat",
        "inspect runs/chat --samples 10 --color always",
    )
    parser.add_argument("folder", type=path_word, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--samples", type=int, default=3, metavar="N", help="samples to show (default: %(default)s)"
    )
    parser.add_argument(
        "--color",
        choices=("always", "never", "auto"),
        default="auto",
        help="colour the trained tokens; without colour they stand in brackets (default: "
        "%(default)s, on a terminal)",
    )
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> None:
    """Print the samples, and the settings that they were encoded with."""
    from rich.text import Text

    from miles.report.first_batch import inspect_run

    console = open_console(flags.color)
    inspect_run(flags.folder, console, flags.samples)
    for line in account_of(flags.folder):
        console.print(Text(line, style="dim"), soft_wrap=True)
    if (words := encoding_of(flags.folder)) is not None:
        settings = shlex.join(words) or "the defaults"
        console.print(Text(f"encoded with {settings}", style="dim"), soft_wrap=True)


def account_of(folder: str) -> list[str]:
    """Return what a finished run dropped and did not use, in short.

    Nothing where its ledger is missing, as while it runs, or broken.
    """
    from miles.data.stream import account
    from miles.report.run_data import read_ledger

    try:
        return account.sentences(read_ledger(folder))
    except (LookupError, TypeError, AttributeError, SourceError):
        return []


def encoding_of(folder: str) -> list[str] | None:
    """Return the encoding settings of a run as flags.

    None where its config.json is missing, broken, or of an older run, without them.
    """
    from miles.common import own_files, run_folder, storage

    try:
        encode = own_files.read_object(storage.join(folder, run_folder.CONFIG))["data"]["encode"]
    except (LookupError, TypeError, SourceError):
        return None
    return words_of(EncodeConfig, encode) if isinstance(encode, Mapping) else None
