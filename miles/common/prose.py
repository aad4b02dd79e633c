"""A sentence on a screen: broken between words on a terminal, in one piece elsewhere.

    miles: error: /data/rows.jsonl: no such file; did        a terminal breaks after its last
    you mean /data/row.jsonl?                                column, also in the middle of a word

Paths and other long words stay whole, so that they can be copied. In a pipe or a file nothing is
broken: a search finds the sentence in one piece.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from miles.common.screen import is_live


@dataclass(frozen=True)
class Prose:
    """One or more sentences. Plain text is printed as it is, never read as markup.

    A further line is indented as the first one. Print it with `soft_wrap=True`, or rich breaks the
    words that are longer than a line.
    """

    text: str | Text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = self.text if isinstance(self.text, Text) else Text(self.text)
        if not is_live(console):
            yield text
            return

        for line in text.split("\n", allow_blank=True):
            indent = len(line.plain) - len(line.plain.lstrip(" "))
            for piece in broken(line[indent:], options.max_width - indent):
                piece.rstrip()
                yield Text.assemble(" " * indent, piece)


def broken(text: Text, num_columns: int) -> Iterable[Text]:
    """Return the lines of a text. A word that is longer than a line stays whole."""
    begins = []
    num_used = 0
    for word in re.finditer(r"\S+\s*", text.plain):
        if num_used and num_used + cell_len(word[0].rstrip()) > num_columns:
            begins.append(word.start())
            num_used = 0
        num_used += cell_len(word[0])
    return text.divide(begins)
