"""A conversation as the model sees it, coloured by its mask, as HTML and as text for terminals.

    ids and mask  ->  <|im_start|>user↵ 2+2?<|im_end|>↵ <|im_start|>assistant↵ [4<|im_end|>]↵

Trained tokens have a green background, the others are grey; newlines are drawn as ↵ and kept. A
character whose bytes are spread over several tokens is shown once, as one piece.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from rich.style import Style
from rich.text import Text

from miles.common.screen import Screen, printable
from miles.data.types import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
_MAX_TOKENS_A_CHARACTER = 8

_TRAINED = Style(color="black", bgcolor="green3")
_CONTEXT = Style(color="grey58")

# Translucent backgrounds over the page's own colours, so that light and dark themes both work.
_BOX_CSS = (
    "white-space:pre-wrap;overflow-wrap:anywhere;"
    "font:13px/1.75 ui-monospace,Menlo,Consolas,monospace;"
    "border:1px solid rgba(128,128,128,.35);border-radius:6px;padding:10px 12px;margin:8px 0"
)
_LEGEND_CSS = (
    "font:12px/1.5 system-ui,sans-serif;opacity:.75;border-bottom:1px solid rgba(128,128,128,.35);"
    "padding-bottom:6px;margin-bottom:8px;white-space:normal"
)
_TRAINED_CSS = "background:rgba(46,160,67,.32);padding:2px 0;border-radius:2px"
_CONTEXT_CSS = "background:rgba(128,128,128,.14);opacity:.75;padding:2px 0;border-radius:2px"
_TITLE_CSS = "font:14px system-ui,sans-serif;margin-top:.8em"
_EDGE_CSS = "box-shadow:inset -1px 0 rgba(128,128,128,.45)"


class Piece(NamedTuple):
    """Text of one token, or of several that only make characters together."""

    text: str
    token_ids: tuple[int, ...]
    is_trained: bool


def pieces(
    input_ids: Sequence[int], loss_mask: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Piece]:
    """Decode token by token, joining tokens whose bytes only make characters together.

    Args:
        input_ids: arrays or lists [tokens].
        loss_mask: [tokens].
    """
    ids = [int(token) for token in input_ids]
    begin = 0
    while begin < len(ids):
        end = begin + 1
        first = _decode(tokenizer, ids[begin:end])
        text = first
        while text.endswith(_REPLACEMENT) and end < min(len(ids), begin + _MAX_TOKENS_A_CHARACTER):
            end += 1
            text = _decode(tokenizer, ids[begin:end])

        # Bytes that never become a character, or a U+FFFD in the text itself.
        if text.endswith(_REPLACEMENT):
            end = begin + 1
            text = first
        yield Piece(text, tuple(ids[begin:end]), all(loss_mask[begin:end]))
        begin = end


def to_html(
    encoded: Encoded | tuple[Sequence[int], Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> str:
    """Return a self-contained HTML fragment: inline styles, no scripts, all text escaped.

    Args:
        encoded: a sample, or the pair (token ids, mask of tokens) that a run's folder keeps.
    """
    input_ids, loss_mask = _ids_and_mask(encoded)
    runs = ""
    all_pieces = pieces(input_ids, loss_mask, tokenizer)
    for is_trained, run in groupby(all_pieces, lambda piece: piece.is_trained):
        tokens = "".join(_token_html(piece) for piece in run)
        runs += f'<span style="{_TRAINED_CSS if is_trained else _CONTEXT_CSS}">{tokens}</span>'

    num_trained = sum(int(flag) for flag in loss_mask)
    return (
        f'<div style="{_BOX_CSS}"><div style="{_LEGEND_CSS}">'
        f'<span style="{_TRAINED_CSS};padding:2px 6px">trained</span> '
        f"{num_trained:,} of {len(input_ids):,} tokens</div>{runs}</div>"
    )


def _token_html(piece: Piece) -> str:
    ids = " ".join(map(str, piece.token_ids))
    text = html.escape(_visible(piece.text))
    return f'<span style="{_EDGE_CSS}" title="{ids}">{text}</span>'


def to_text(
    encoded: Encoded | tuple[Sequence[int], Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> Text:
    """Return the same for a terminal, as rich text; arguments as in `to_html`."""
    input_ids, loss_mask = _ids_and_mask(encoded)
    text = Text()
    for piece in pieces(input_ids, loss_mask, tokenizer):
        text.append(_visible(piece.text), _TRAINED if piece.is_trained else _CONTEXT)
    return text


class Preview:
    """Conversations coloured by their mask, for a terminal and for a notebook.

    Args:
        samples: row id and sample of each.
    """

    def __init__(
        self, samples: Sequence[tuple[int, Encoded]], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._samples = samples
        self._tokenizer = tokenizer

    def __rich__(self) -> Text:
        text = Text()
        for row_id, sample in self._samples:
            num_trained = int(sample.loss_mask.sum())
            title = f"row {row_id} · {len(sample.input_ids)} tokens, {num_trained} trained\n"
            text.append(title, "bold")
            text.append_text(to_text(sample, self._tokenizer)).append("\n")
        return text

    def __repr__(self) -> str:
        console = Screen(width=100, markup=False, emoji=False)
        with console.capture() as capture:
            console.print(self.__rich__())
        return capture.get()

    def _repr_html_(self) -> str:
        fragments = ""
        for row_id, sample in self._samples:
            fragments += f'<div style="{_TITLE_CSS}"><b>row {row_id}</b>'
            fragments += f"{to_html(sample, self._tokenizer)}</div>"
        return fragments


def _ids_and_mask(
    encoded: Encoded | tuple[Sequence[int], Sequence[int]],
) -> tuple[Sequence[int], Sequence[int]]:
    input_ids, loss_mask = (
        (encoded.input_ids.tolist(), encoded.loss_mask.tolist())
        if isinstance(encoded, Encoded)
        else encoded
    )
    assert len(input_ids) == len(loss_mask), "one mask entry a token"
    return input_ids, loss_mask


def _visible(text: str) -> str:
    return printable(text).replace("\n", "↵\n")


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
