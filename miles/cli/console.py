"""The common parts of the commands: the screen that they print on, and a name for a type."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

from miles.common.local_paths import absolute, absolute_or_hub_name

if TYPE_CHECKING:
    from rich.console import Console

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""The type that `add_subparsers` returns."""


def path_word(word: str) -> str:
    """Return a path of the command line as `absolute` does; refuse an empty one.

    Raises:
        ArgumentTypeError: it is empty; argparse names the argument.
    """
    return absolute(_filled(word))


def tokenizer_word(word: str) -> str:
    """Return a tokenizer's folder or hub name: as `path_word`."""
    return absolute_or_hub_name(_filled(word))


def _filled(word: str) -> str:
    if not word:
        raise argparse.ArgumentTypeError(
            "it is empty, such as a variable that is not set; give a path"
        )
    return word


def open_console(color: str = "auto") -> Console:
    """Return the screen. It colours only text that a command marks, and reads no text as markup.

    What goes into a pipe or a file is not broken into lines.

    Args:
        color: "always", "never", or "auto": on a terminal, and as NO_COLOR and FORCE_COLOR say.
    """
    from miles.common.screen import WIDE_COLUMNS, Screen

    settings: dict[str, Any] = {}
    if color == "always":
        settings = {"color_system": "256", "force_terminal": True, "no_color": False}
    elif color == "never":
        settings = {"color_system": None, "no_color": True}
    if not sys.stdout.isatty():
        settings["width"] = WIDE_COLUMNS
    return Screen(highlight=False, markup=False, emoji=False, **settings)
