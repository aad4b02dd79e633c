"""The layout of `--help`: as argparse has it, on screens of any width, and no flag in two pieces."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable


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
        return "\n".join(indent + line for line in self._wrapped(text, width - len(indent)))

    def _wrapped(self, text: str, width: int, indent: str = "") -> list[str]:
        """Return the lines of a text. A word that is longer than a line stays whole."""
        return textwrap.wrap(
            " ".join(text.split()),
            max(width, 11),
            subsequent_indent=indent,
            break_on_hyphens=False,
            break_long_words=False,
        )
