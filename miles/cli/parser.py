"""The parser of the commands. Its errors quote no word that belongs to no flag.

miles report RUN --wandb-key KEY   ->   miles: error: there is no flag --wandb-key here
miles trian                        ->   miles: error: … invalid choice (…); did you mean miles train?
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from miles.common.help_lines import HelpLines
from miles.errors import brief

_QUOTED_WORD = re.compile(r"(ignored explicit argument) .*")


class CommandParser(argparse.ArgumentParser):
    """argparse's, but a misplaced word is not quoted: it may be a secret."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a whole line; a word that belongs to no flag ends the process."""
        flags, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(_unknown(unknown, _flags_of(self, sys.argv[1:] if args is None else args)))
        return flags

    def error(self, message: str) -> NoReturn:
        """Print how the command is used and what is wrong, and end the process with 2."""
        super().error(brief(_QUOTED_WORD.sub(r"\1; see --help", message)))

    def _get_formatter(self) -> argparse.HelpFormatter:
        return HelpLines(self.prog)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a word that is none of the choices, and name the one that it is like."""
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        meant = dict(zip(choices, choices, strict=True))
        if isinstance(action, argparse._SubParsersAction):
            meant = dict(_commands(action))
        near = closest(str(value), meant)
        hint = f"; did you mean {meant[near]}?" if near else ""
        raise argparse.ArgumentError(
            action, f"invalid choice (choose from {', '.join(choices)}){hint}"
        )


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that a mistyped one is like; None where it is like none."""
    near = difflib.get_close_matches(word[:_LONGEST].lower(), list(known), n=1, cutoff=0.6)
    return near[0] if near else None


_LONGEST = 60
"""Characters of a word that are compared: no name is as long."""


def _commands(action: argparse._SubParsersAction[Any]) -> Iterator[tuple[str, str]]:
    """Yield the names of commands, and how each is written: `verify` is `miles convert verify`."""
    for name, parser in action.choices.items():
        for inner in parser._actions:
            if isinstance(inner, argparse._SubParsersAction):
                yield from _commands(inner)
        yield name, parser.prog


def require_whole_names(parser: argparse.ArgumentParser) -> None:
    """Have a parser and its commands take no abbreviation of a flag, as `miles train` takes none.

    One that is clear today has two meanings when a flag is added.
    """
    parser.allow_abbrev = False
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                require_whole_names(command)


def _flags_of(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Return the flags of the command that a line names."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for place, word in enumerate(words):
                if word in action.choices:
                    return _flags_of(action.choices[word], words[place + 1 :])
    return list(parser._option_string_actions)


def _unknown(words: Sequence[str], flags: Sequence[str]) -> str:
    """Return what is wrong with words that belong to no flag.

    Args:
        flags: that the command has.
    """
    from miles.train.launch.known_flags import shown_name

    if words[0].startswith("--"):
        name = shown_name(words[0])
        near = closest(name, flags)
        hint = f"did you mean {near}?" if near else "see --help"
        return f"there is no flag {name} here; {hint}"
    return "a word of the line belongs to no flag; see --help"
