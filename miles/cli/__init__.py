"""The `miles` command: one file a subcommand, with its flags and what it runs.

In: a command line. Out: the exit status: 0, or that of an error, with one line on the error stream.
It runs in the process that the user starts. It may import every room, but only when a command
runs: `miles --help` loads none of them.
"""

from __future__ import annotations

import argparse
import errno
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
from miles.cli.parser import CommandParser
from miles.errors import MilesError, WriteError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""Errors of the disk, which the user can mend: full, quota used up, read-only, not permitted."""


def main(words: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        words: the command line without the program's name; None: the process's own.

    Returns:
        the exit status: 0; that of the error's kind (`miles.errors`) with one message on the error
        stream; 130 after Ctrl-C.
    """
    words = sys.argv[1:] if words is None else list(words)

    try:
        if words[:1] == [train.NAME]:  # launch lines have rules of their own
            train.run(words[1:])
        else:
            if words[:2] == [convert.NAME, convert.HF_TO_MEGATRON]:
                convert.check_hf_to_megatron(words[2:])
            flags = build_parser().parse_args(words)
            flags.run(flags)
    except MilesError as error:
        _print_error(error)
        return error.exit_status
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        _print_error(error)
        return WriteError.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = CommandParser(
        prog="miles", description="Supervised fine-tuning: data -> loss -> optimizer."
    )
    parser.add_argument("--version", action="version", version=__version__)

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
    return parser


def _print_error(error: Exception) -> None:
    """Print an error on one line, which the terminal wraps and a search finds in one piece."""
    from rich.console import Console
    from rich.markup import escape

    text = f"[red]miles: error:[/red] {escape(str(error))}"
    Console(stderr=True, highlight=False).print(text, soft_wrap=True, emoji=False)
