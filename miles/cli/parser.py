"""The parser of the commands. Its errors quote no word that belongs to no flag.

miles report RUN --wandb-key KEY   ->   miles: error: there is no flag --wandb-key here
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

_QUOTED_CHOICE = re.compile(r"invalid choice: .* (?=\(choose from)")
_QUOTED_WORD = re.compile(r"(ignored explicit argument) .*")


class CommandParser(argparse.ArgumentParser):
    """argparse's, but a misplaced word is not quoted: it may be a secret."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a whole line; a word that belongs to no flag ends the process."""
        flags, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(_unknown(unknown))
        return flags

    def error(self, message: str) -> NoReturn:
        """Print how the command is used and what is wrong, and end the process with 2."""
        message = _QUOTED_CHOICE.sub("invalid choice ", message)
        super().error(_QUOTED_WORD.sub(r"\1; see --help", message))


def require_whole_names(parser: argparse.ArgumentParser) -> None:
    """Have a parser and its commands take no abbreviation of a flag, as `miles train` takes none.

    One that is clear today has two meanings when a flag is added.
    """
    parser.allow_abbrev = False
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                require_whole_names(command)


def _unknown(words: Sequence[str]) -> str:
    """Return what is wrong with words that belong to no flag."""
    from miles.train.launch.known_flags import shown_name

    if words[0].startswith("--"):
        return f"there is no flag {shown_name(words[0])} here; see --help"
    return "a word of the line belongs to no flag; see --help"
