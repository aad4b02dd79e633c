"""Text that comes in pieces, broken into lines between words, as soon as it can be shown.

    "The quick bro", "wn fox"   ->   The quick
                                     brown fox          on a screen of ten columns

A word is shown when its end is known, or when it is longer than a line. Line breaks of the text
stay. What is not for a screen is not wrapped.
"""

from __future__ import annotations

import re

from rich.cells import cell_len

_WORD = re.compile(r"\n|[^\S\n]+|\S+")


class Wrapper:
    """Breaks a stream of text into lines.

    Args:
        num_columns: of a line; None: nothing is broken.
    """

    def __init__(self, num_columns: int | None) -> None:
        self._num_columns = num_columns
        self._num_used = 0
        self._blanks = ""
        self._word = ""

    def add(self, piece: str) -> str:
        """Return what can be shown after a further piece of the text."""
        if self._num_columns is None:
            return piece
        shown = ""
        for part in _WORD.findall(piece):
            if part == "\n":
                shown += self._end_word() + "\n"
                self._blanks = ""
                self._num_used = 0
            elif part.isspace():
                shown += self._end_word()
                self._blanks += part
            else:
                self._word += part
                if cell_len(self._word) > self._num_columns:
                    shown += self._end_word()
        return shown

    def end(self) -> str:
        """Return what is left when the text has ended."""
        return self._end_word()

    def _end_word(self) -> str:
        """Return the word so far, behind its blanks or on a line of its own."""
        if not self._word:
            return ""
        assert self._num_columns is not None
        before = self._blanks.expandtabs(4)
        num_cells = cell_len(self._word)
        if self._num_used and self._num_used + cell_len(before) + num_cells > self._num_columns:
            before = "\n"
            self._num_used = 0
        else:
            self._num_used += cell_len(before)
        shown = before + self._word
        self._num_used += num_cells
        self._blanks, self._word = "", ""
        return shown
