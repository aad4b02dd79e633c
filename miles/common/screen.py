"""What a screen can show: a terminal has lines that change and colours, a pipe or a file has not."""

from __future__ import annotations

from rich.console import Console

WIDE_COLUMNS = 10_000
"""Width of a screen that is no terminal: nothing is broken into lines there."""


def is_live(console: Console) -> bool:
    """Return whether a line can change in place.

    FORCE_COLOR asks for colours, also in a pipe; it makes no terminal of it.
    """
    is_terminal = getattr(console.file, "isatty", lambda: False)()
    return bool(is_terminal) and console.is_terminal and not console.is_dumb_terminal


def has_colours(console: Console) -> bool:
    """Return whether a colour can be told from another."""
    return console.color_system is not None and not console.no_color
