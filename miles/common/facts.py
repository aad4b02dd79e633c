"""Facts on a screen: a label, and a text beside it whose words and paths stay whole.

    checkpoint    /models/Qwen3-4B              checkpoint
    family        qwen3, 36 layers of               /models/Qwen3-4B
                  2560                          family                on a narrow screen

rich's tables break a path that is longer than its column; a path in pieces cannot be copied. Here,
the terminal breaks it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from miles.common.prose import broken

_GAP = 4
"""Columns between a label and its text."""
_MIN_COLUMNS = 30
"""A text beside its label has them; where there are fewer, it stands below it."""


@dataclass(frozen=True)
class Facts:
    """Labels and their texts. Plain text is printed as it is, never read as markup.

    Print them with `soft_wrap=True`, or rich cuts what is longer than the screen.
    """

    facts: Iterable[tuple[str, str | Text]]
    title: str = ""
    indent: int = 2

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield Text(self.title, "bold")
        facts = list(self.facts)
        longest = max((cell_len(label) for label, _ in facts), default=0)
        begin = self.indent + longest + _GAP
        is_narrow = options.max_width - begin < _MIN_COLUMNS
        if is_narrow:
            begin = self.indent + _GAP

        for label, fact in facts:
            text = fact if isinstance(fact, Text) else Text(fact)
            head = Text.assemble(" " * self.indent, (label, "dim"))
            if is_narrow:
                yield head
                head = Text()
            for line in broken(text, options.max_width - begin):
                line.rstrip()
                yield Text.assemble(head, " " * (begin - head.cell_len), line)
                head = Text()
