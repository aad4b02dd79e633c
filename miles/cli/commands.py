"""All commands: the parser of their lines, and running one."""

from __future__ import annotations

import argparse

from miles import __version__
from miles.cli import (
    certify,
    chat,
    compare,
    completion,
    convert,
    demo,
    generate,
    inspect,
    prepare,
    report,
    tiny_model,
    train,
)
from miles.cli.outcome import exit_status_of
from miles.cli.parser import CommandParser, require_whole_names
from miles.common.debugging import show_debugging
from miles.common.help_lines import explain

_DEBUG = "--debug"
_LASTING = (
    demo.NAME,
    prepare.NAME,
    convert.NAME,
    train.NAME,
    generate.NAME,
    report.NAME,
    tiny_model.NAME,
)
"""Commands that write files: they go on where nobody reads what they print."""


def run_line(words: list[str]) -> int:
    """Run a command line, and return its exit status."""
    command = next(filter(lambda word: word != _DEBUG, words), "")
    return exit_status_of(lambda: _run(words), is_printed=command not in _LASTING)


def _run(words: list[str]) -> None:
    if words[:1] == [_DEBUG]:
        show_debugging()
        words = words[1:]

    if words[:1] == [train.NAME]:  # launch lines have rules of their own
        train.run(words[1:])
        return
    flags = build_parser().parse_args(words)
    flags.run(flags)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = CommandParser(prog="miles")
    explain(
        parser,
        "Supervised fine-tuning: data -> loss -> optimizer. Each command has a --help of its own.",
        "demo",
        "train --help",
        "completion --install",
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
        chat,
        generate,
        report,
        compare,
        tiny_model,
        completion,
    ):
        command.add_parser(commands)
    require_whole_names(parser)
    return parser
