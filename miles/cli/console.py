"""The common parts of the commands: the screen that they print on, and a name for a type."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""The type that `add_subparsers` returns."""


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
