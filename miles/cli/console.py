"""The common parts of the commands: the screen that they print on, and a name for a type."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""The type that `add_subparsers` returns."""


def open_console() -> Console:
    """Return the screen. It colours what is `Text` with a style, and reads no markup in strings.

    A path with brackets would lose them: `run[1]` is a tag of rich's markup.
    """
    from miles.common.screen import Screen

    return Screen(highlight=False, markup=False, emoji=False)
