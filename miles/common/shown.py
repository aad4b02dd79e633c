"""A value as an error quotes it: not more of it than fits a sentence.

    shown("x")          'x'
    shown([1] * 10**6)  [1, 1, 1, 1, …
    cut("[" * 10**6)    [[[[[[[[…

The text of an error as a whole is kept short by `errors.brief`, whatever stands in it.
"""

from __future__ import annotations

import re

_MOST = 80
_LINES = re.compile(r"\s*\n\s*")


def shown(value: object, most: int = _MOST) -> str:
    """Return a value as Python writes it, cut."""
    try:
        # A table of a library has lines; the text of a Python value has none.
        return cut(_LINES.sub(" ", repr(value)), most)
    except ValueError:  # Python writes no integers of over 4,300 digits
        return "a number of thousands of digits"


def cut(text: str, most: int = _MOST) -> str:
    """Return a text, or its beginning and a mark."""
    return text if len(text) <= most else f"{text[:most]}…"
