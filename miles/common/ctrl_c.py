"""Ctrl-C says what it leaves, in a command and in a script alike.

    with on_ctrl_c("stopped; nothing was written"): …
    KeyboardInterrupt: Ctrl-C: stopped; nothing was written

A command prints the text alone, and ends with 130.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def on_ctrl_c(text: str) -> Iterator[None]:
    """Have Ctrl-C in the context say what it leaves, unless it does so already."""
    try:
        yield
    except KeyboardInterrupt as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # while the first one cleared up
            text = "stopped at once; what was begun may be left, and the same command removes it"
        raise KeyboardInterrupt(str(error) or f"Ctrl-C: {text}") from None
