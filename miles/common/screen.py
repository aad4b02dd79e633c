"""A screen that untrusted text cannot control: rich's console, with pictures for control codes.

    a file that is called "a\\x1b[2Jb"     ->  a␛[2Jb
    "\\u202e" (writes from right to left)  ->  \\ufffd

Names of files, texts of rows and errors of libraries are printed. An escape code among them could
clear the screen, rename the window, or type into the shell.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

WIDE_COLUMNS = 10_000
"""Width of a screen that is no terminal: nothing is broken into lines there."""

_REPLACEMENT = "\ufffd"
_PICTURES = (
    {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
    | {0x7F: "\u2421"}
    | dict.fromkeys(range(0x80, 0xA0), _REPLACEMENT)
    | dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), _REPLACEMENT)
)
_CONTROL = re.compile(f"[{''.join(map(re.escape, map(chr, _PICTURES)))}]")


def printable(text: str) -> str:
    """Return a text with a picture for each control code but tabs and newlines."""
    return text.translate(_PICTURES) if _CONTROL.search(text) else text


class Screen(Console):
    """A console that prints control codes as pictures, whatever they stand in."""

    def on_broken_pipe(self) -> None:
        """Leave the error to the command; rich would end the process with 1."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments of what is printed."""
        for segment in super().render(renderable, options):
            if segment.control:  # of rich itself, such as that of a progress bar
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


def is_live(console: Console) -> bool:
    """Return whether a line can change in place.

    FORCE_COLOR asks for colours, also in a pipe; it makes no terminal of it.
    """
    is_terminal = getattr(console.file, "isatty", lambda: False)()
    return bool(is_terminal) and console.is_terminal and not console.is_dumb_terminal


def has_colours(console: Console) -> bool:
    """Return whether a colour can be told from another."""
    return console.color_system is not None and not console.no_color
