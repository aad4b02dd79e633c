"""Token ids coloured by whether they are trained: for a terminal and for a page."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any

from rich.text import Text

_TRAINED = "background:rgba(46,160,67,.28);border-radius:2px"
_REST = "opacity:.62"


def pieces(input_ids: Sequence[int], loss_mask: Sequence[int], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Runs of equal mask, decoded together, so that a character split over tokens is whole."""
    start = 0
    for end in range(1, len(input_ids) + 1):
        if end == len(input_ids) or bool(loss_mask[end]) != bool(loss_mask[start]):
            yield tokenizer.decode(list(input_ids[start:end])), bool(loss_mask[start])
            start = end


def to_text(input_ids: Sequence[int], loss_mask: Sequence[int], tokenizer: Any) -> Text:
    """For a terminal: trained tokens green, the rest dim."""
    text = Text()
    for piece, trained in pieces(input_ids, loss_mask, tokenizer):
        text.append(piece, style="green" if trained else "dim")
    return text


def to_html(input_ids: Sequence[int], loss_mask: Sequence[int], tokenizer: Any) -> str:
    """A self-contained fragment: trained tokens on green, the rest pale; line breaks kept."""
    spans = "".join(
        f'<span style="{_TRAINED if trained else _REST}">{html.escape(piece)}</span>'
        for piece, trained in pieces(input_ids, loss_mask, tokenizer)
    )
    return f'<pre style="white-space:pre-wrap;overflow-wrap:anywhere;margin:.4em 0;line-height:1.5">{spans}</pre>'
