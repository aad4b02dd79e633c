"""The layout of `--help`: as argparse has it, on screens of any width, and no flag in two pieces.

Lines of a text that begin with `EXAMPLE` are examples: they stay lines of their own, which a shell
takes as they are. One that is longer than the screen is continued behind a backslash.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby

EXAMPLE = "  miles "
"""The beginning of an example's line."""
_SHELL_WORD = re.compile(r"(?:'[^']*'|\"[^\"]*\"|\S)+")


class HelpLines(argparse.HelpFormatter):
    """argparse's, with three changes.

    A word with hyphens is not broken (`--hf-` `checkpoint`), a usage that is given and the titles
    of groups are wrapped, and commands are aligned by the longest of their names.
    """

    def add_argument(self, action: argparse.Action) -> None:
        """Add an argument. Python 3.11 does not count how far the names of commands are indented."""
        super().add_argument(action)
        names = [inner.metavar or inner.dest for inner in self._iter_indented_subactions(action)]
        for name in names:
            length = len(str(name)) + self._current_indent + self._indent_increment
            self._action_max_length = max(self._action_max_length, length)

    def start_section(self, heading: str | None) -> None:
        """Begin a group. Its title is wrapped."""
        if heading is not None:
            heading = "\n".join(self._wrapped(heading, self._width - 1))
        super().start_section(heading)

    def _format_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[argparse._MutuallyExclusiveGroup],
        prefix: str | None,
    ) -> str:
        text = super()._format_usage(usage, actions, groups, prefix)
        if usage is None:
            return text
        return "\n".join(self._wrapped(text, self._width, " " * 7)) + "\n\n"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return self._wrapped(text, width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = []
        for is_example, paragraph in groupby(
            text.split("\n"), lambda line: line.startswith(EXAMPLE)
        ):
            if not is_example:
                lines += self._wrapped(" ".join(paragraph), width - len(indent))
                continue
            for example in paragraph:
                lines += shell_lines(example, width - len(indent))
        return "\n".join(indent + line for line in lines)

    def _wrapped(self, text: str, width: int, indent: str = "") -> list[str]:
        """Return the lines of a text. A word that is longer than a line stays whole."""
        return textwrap.wrap(
            " ".join(text.split()),
            max(width, 11),
            subsequent_indent=indent,
            break_on_hyphens=False,
            break_long_words=False,
        )


def explain(parser: argparse.ArgumentParser, sentence: str, *examples: str) -> None:
    """Give a command's help its sentence above the arguments, and its examples below.

    Args:
        examples: lines that work as they are, without `miles`.
    """
    parser.description = sentence
    lines = [f"{EXAMPLE}{example}" for example in examples]
    parser.epilog = "\n".join(("examples:", *lines))


def shell_lines(command: str, width: int) -> list[str]:
    """Return the lines of a command as a shell takes them; a quoted word is never divided.

    The first one is indented by two columns, the others, behind a backslash, by six.
    """
    lines = [" "]
    for word in _together(_SHELL_WORD.findall(command)):
        if len(lines[-1]) + 1 + len(word) > width - 2 and lines[-1].strip():
            lines[-1] += " \\"
            lines.append("     ")
        lines[-1] += f" {word}"
    return lines


def _together(words: Sequence[str]) -> list[str]:
    """Return the words of a line, each flag in one piece with its first value."""
    pieces: list[str] = []
    for place, word in enumerate(words):
        if place and words[place - 1].startswith("--") and not word.startswith("--"):
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
    return pieces
