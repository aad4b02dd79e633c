"""The parser of the commands. Its errors quote no word that belongs to no flag.

miles report RUN --wandb-key KEY   ->   miles: error: there is no flag --wandb-key here; …
miles trian                        ->   miles: error: … invalid choice (…); did you mean miles train?
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

from miles.common.line_parser import LineParser, misplaced_word
from miles.common.mistakes import Mistakes
from miles.common.near_names import FLAG_LIKENESS, did_you_mean
from miles.errors import ConfigError, MilesError


class CommandParser(LineParser):
    """The parser of a command: it says which of its flags a misspelled one is like."""

    require_known_flag: Callable[[str], None] | None = None
    """raises the error for a flag that is none of the command's, where it has more to say"""

    def unknown_words(self, words: Sequence[str], unknown: Sequence[str]) -> Sequence[MilesError]:
        """Return what is wrong with words that belong to no flag."""
        from miles.train.launch.known_flags import written_flags

        flags = written_flags(unknown)
        if not flags:
            return [misplaced_word(words, unknown[0])]
        mistakes = Mistakes()
        for flag in dict.fromkeys(flags):
            mistakes.of(partial(self.require_known_flag or self._require_known, flag))
        return mistakes.found

    def _require_known(self, flag: str) -> None:
        """Raise the error for a flag that the command does not have."""
        from miles.train.launch.known_flags import shown_name
        from miles.train.launch.parser import launch_settings

        name = shown_name(flag)
        of_train = "miles train has one" if name in launch_settings() else ""
        hint = did_you_mean(name, self._option_string_actions, of_train, FLAG_LIKENESS)
        raise ConfigError(f"there is no flag {name} here{hint}")


def require_whole_names(parser: argparse.ArgumentParser) -> None:
    """Have a parser and its commands take no abbreviation of a flag, as `miles train` takes none.

    One that is clear today has two meanings when a flag is added.
    """
    parser.allow_abbrev = False
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                require_whole_names(command)
