"""The `miles` command: one file a subcommand, with its flags and what it runs.

In: a command line. Out: the exit status: 0, or that of an error, with one paragraph on the error
stream (`outcome.py`). It runs in the process that the user starts. It may import every room, but
only when a command runs: `miles --help` loads none of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from miles import __version__
from miles.cli import (
    certify,
    completion,
    convert,
    demo,
    inspect,
    prepare,
    report,
    tiny_model,
    train,
)
from miles.cli.outcome import exit_status_of
from miles.cli.parser import CommandParser, require_whole_names
from miles.common.debugging import show_debugging

_DEBUG = "--debug"
_LASTING = (demo.NAME, prepare.NAME, convert.NAME, train.NAME, report.NAME, tiny_model.NAME)
"""Commands that write files: they go on where nobody reads what they print."""


def main(words: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        words: the command line without the program's name; None: the process's own.

    Returns:
        the exit status: 0; that of the error's kind (`miles.errors`) with one message on the error
        stream; 1 for a mistake of our own; 130 after Ctrl-C.
    """
    words = sys.argv[1:] if words is None else list(words)
    command = next(filter(lambda word: word != _DEBUG, words), "")
    return exit_status_of(lambda: _run(words), is_printed=command not in _LASTING)


def _run(words: list[str]) -> None:
    if words[:1] == [_DEBUG]:
        show_debugging()
        words = words[1:]

    if words[:1] == [train.NAME]:  # launch lines have rules of their own
        train.run(words[1:])
        return
    if words[:2] == [convert.NAME, convert.HF_TO_MEGATRON]:
        convert.check_hf_to_megatron(words[2:])
    flags = build_parser().parse_args(words)
    flags.run(flags)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = CommandParser(
        prog="miles", description="Supervised fine-tuning: data -> loss -> optimizer."
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        _DEBUG, action="store_true", help="show the traceback of an error, as MILES_DEBUG=1 does"
    )

    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (
        demo,
        prepare,
        certify,
        convert,
        train,
        inspect,
        report,
        tiny_model,
        completion,
    ):
        command.add_parser(commands)
    require_whole_names(parser)
    return parser
