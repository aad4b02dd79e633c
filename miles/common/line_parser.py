"""argparse's parser, but it names all mistakes of a line at once, and raises them as one of ours.

    miles inspect --samples x --colour no
    -> 3 mistakes: (1) argument --samples: invalid int value: 'x'; (2) RUN is missing; (3) there is
       no flag --colour here; did you mean --color?

argparse ends the process at the first mistake. It calls a few methods of its own for each argument,
all there from Python 3.11 on; those are replaced here.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

from miles.common.help_lines import HelpLines
from miles.common.mistakes import Mistakes
from miles.common.near_names import did_you_mean
from miles.errors import ConfigError, MilesError

_QUOTED_WORD = re.compile(r"ignored explicit argument .*")


class LineParser(argparse.ArgumentParser):
    """A parser that names all mistakes of a line at once. No message quotes a misplaced word."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the words of this command, and leave none over.

        Raises:
            ConfigError: names each flag that is missing, unknown or lacks its value, and each value
                that cannot be taken.
        """
        words = list(sys.argv[1:] if args is None else args)
        flags = self._parse(words, namespace)
        self._mistakes.raise_all(self._hint)
        return flags, []

    def parse_as_far_as_possible(self, words: Sequence[str]) -> tuple[argparse.Namespace, Mistakes]:
        """Return what can be taken of a line, and its mistakes; None stands for a wrong value."""
        try:
            flags = self._parse(words, None)
        except ConfigError:  # argparse could not go on
            flags = argparse.Namespace()
        return flags, self._mistakes

    def _parse(self, words: Sequence[str], namespace: Any) -> Any:
        """Parse words, and note the mistakes among them."""
        self._mistakes = Mistakes()
        self._seen: list[argparse.Action] = []
        required = [action for action in self._actions if action.required]
        try:
            # What is missing is found below, together with the rest.
            for action in required:
                action.required = False
            flags, unknown = super().parse_known_args(list(words), namespace)
        finally:
            for action in required:
                action.required = True

        missing = [action for action in required if action not in self._seen]
        if missing:
            names = [_name(action) for action in missing]
            self._mistakes.add([ConfigError(missing_text(names) + _choices(missing[-1]))])
        if unknown:
            self._mistakes.add(self.unknown_words(words, unknown))
        return flags

    def unknown_words(self, words: Sequence[str], unknown: Sequence[str]) -> Sequence[MilesError]:
        """Return what is wrong with words that belong to no flag.

        Args:
            words: the words of the command.
            unknown: some of them, at least one.
        """
        return [misplaced_word(words, unknown[0])]

    def error(self, message: str) -> NoReturn:
        """Raise what argparse cannot go on from, with what was found before it.

        Raises:
            ConfigError: always.
        """
        message = _QUOTED_WORD.sub("it takes no value", message)
        self._mistakes.add([ConfigError(message)])
        self._mistakes.raise_all(self._hint)
        raise AssertionError("there is a mistake")

    @property
    def _hint(self) -> str:
        return f"see {self.prog} --help"

    def _get_formatter(self) -> argparse.HelpFormatter:
        return HelpLines(self.prog)

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        """Return how many words an argument takes; none where its value is missing."""
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError as error:
            self._note(error)
            return 0

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Return the value of an argument; None where it cannot be taken."""
        self._seen.append(action)
        if isinstance(action, argparse._SubParsersAction):
            return super()._get_values(action, arg_strings)
        if not arg_strings and action.nargs is None:
            return None  # its value is missing: that is noted

        take = partial(super()._get_values, action, arg_strings)
        try:
            return self._mistakes.of(take)
        except argparse.ArgumentError as error:
            self._note(error)
            return None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a word that is none of the choices, and name the one that it is like."""
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        meant = {choice: choice for choice in choices}
        if isinstance(action, argparse._SubParsersAction):
            meant = commands_of(action)
        hint = did_you_mean(str(value), meant)
        for name, written in meant.items():
            hint = hint.replace(f" {name}?", f" {written}?")
        raise argparse.ArgumentError(
            action, f"invalid choice (choose from {', '.join(choices)}){hint}"
        )

    def _note(self, error: argparse.ArgumentError) -> None:
        self._mistakes.add([ConfigError(str(error))])


def missing_text(names: Sequence[str]) -> str:
    """Return the sentence on arguments that a line lacks: "--save and --lr are missing"."""
    if len(names) == 1:
        return f"{names[0]} is missing"
    return f"{', '.join(names[:-1])} and {names[-1]} are missing"


def misplaced_word(words: Sequence[str], word: str) -> ConfigError:
    """Return the error for a word that belongs to no flag. It is not quoted: it may be a secret."""
    # The same word may stand elsewhere as a value, so the object counts.
    places = [place for place, other in enumerate(words) if other is word]
    place = places[0] if places else list(words).index(word)
    flags = [other for other in words[:place] if other.startswith("--")]
    behind = f", behind {flags[-1].split('=')[0]}" if flags else ""
    return ConfigError(f"word {place + 1} of the line{behind}, belongs to no flag")


def commands_of(action: argparse._SubParsersAction[Any]) -> dict[str, str]:
    """Return the names of commands, and how each is written: verify -> miles convert verify."""
    commands: dict[str, str] = {}
    for name, parser in action.choices.items():
        for inner in parser._actions:
            if isinstance(inner, argparse._SubParsersAction):
                commands |= commands_of(inner)
        commands[name] = parser.prog
    return commands


def _choices(action: argparse.Action) -> str:
    """Return the commands that could stand in the place of a missing one; of others, nothing."""
    if not isinstance(action, argparse._SubParsersAction):
        return ""
    return f" (choose from {', '.join(action.choices)})"


def _name(action: argparse.Action) -> str:
    """Return an argument as a line has it: `--output`, or `RUN`."""
    if action.option_strings:
        return action.option_strings[-1]
    return str(action.metavar or action.dest)
