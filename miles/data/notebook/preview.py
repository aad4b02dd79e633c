"""A conversation as the model sees it, coloured by its mask, as HTML and as text for terminals.

    ids and mask  ->  <|im_start|>user↵ 2+2?<|im_end|>↵ <|im_start|>assistant↵ [4<|im_end|>]↵

Trained tokens have a green background, the others are grey; without colours, trained tokens stand
in [[ ]]. Newlines are drawn as ↵ and kept. No token is broken at the end of a line. A
character whose bytes are spread over several tokens is shown once, as one piece.
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple, overload

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.style import Style
from rich.text import Text

from miles.common.screen import WIDE_COLUMNS, Screen, has_colours, printable
from miles.data.types import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from miles.data.notebook.row import Row

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
_BASIS_CSS = "font:12px system-ui,sans-serif;opacity:.65"
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
    encoded: Encoded | tuple[Sequence[int], Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: int | None = None,
    has_colours: bool = True,
) -> Text:
    """Return the same for a terminal, as rich text; other arguments as in `to_html`.

    Args:
        columns: a token that would not fit into the line begins the next one; None: lines end only
            where the text has a newline.
        has_colours: else trained tokens stand in brackets (`brackets_of`).
    """
    input_ids, loss_mask = _ids_and_mask(encoded)
    all_pieces = list(pieces(input_ids, loss_mask, tokenizer))
    begin, end = ("", "") if has_colours else brackets_of(all_pieces)
    text = Text(no_wrap=True, overflow="ignore")
    column = 0

    for is_trained, run in groupby(all_pieces, lambda piece: piece.is_trained):
        shown = [_visible(piece.text) for piece in run]
        if is_trained:
            shown[0] = begin + shown[0]
            shown[-1] += end
        for token in shown:
            if columns and column and column + cell_len(token.split("\n")[0]) > columns:
                text.append("\n")
                column = 0
            text.append(token, _TRAINED if is_trained else _CONTEXT)
            column = cell_len(token.rsplit("\n", 1)[-1]) + (0 if "\n" in token else column)
    return text


def brackets_of(all_pieces: Sequence[Piece]) -> tuple[str, str]:
    """Return what marks the trained tokens where there is no colour, and is not in the text."""
    whole = "".join(piece.text for piece in all_pieces)
    return ("⟦", "⟧") if "[[" in whole or "]]" in whole else ("[[", "]]")


def legend(*, has_colours: bool) -> str:
    """Return a sentence on what marks the trained tokens."""
    if has_colours:
        return "trained tokens are green"
    return "trained tokens stand in [[ ]], or in ⟦ ⟧ where the text has such brackets itself"


class Preview(Sequence["Row"]):
    """Rows coloured by their mask, for a terminal and for a notebook.

    Args:
        rows: to show; one that is dropped is shown as it stands, with the reason and what to do.
        basis: which rows were looked at, such as "the 3 longest of all 300 rows".
    """

    def __init__(self, rows: Sequence[Row], basis: str = "") -> None:
        self._rows = list(rows)
        self._basis = basis

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Preview: ...

    def __getitem__(self, index: int | slice) -> Row | Preview:
        if isinstance(index, slice):
            return Preview(self._rows[index], self._basis)
        return self._rows[index]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        is_coloured = has_colours(console)
        columns = options.max_width if options.max_width < WIDE_COLUMNS else None
        if self._basis:
            yield Text(self._basis, "dim")
        if any(row.encoded for row in self._rows):
            yield Text(legend(has_colours=is_coloured), "dim")

        for row in self._rows:
            title = f"row {row.row_id} · {row.outcome()} · {row.place}"
            yield Text(title, "bold", overflow="fold")
            if row.encoded is not None:
                yield to_text(row.encoded, row.tokenizer, columns=columns, has_colours=is_coloured)
            else:
                for line in _why(row):
                    yield Text(f"  {line}", overflow="fold")
                yield Text(row.raw_text(), _CONTEXT, overflow="fold")

    def to_text(self, columns: int = 100) -> str:
        """Return the rows as text of at most so many columns; trained tokens stand in brackets."""
        return as_text(self, columns, is_folded=True)

    def __repr__(self) -> str:
        ids = ", ".join(f"{row.row_id:,}" for row in self._rows[:6])
        more = ", …" if len(self._rows) > 6 else ""
        basis = f"; {self._basis}" if self._basis else ""
        rows = f"rows {ids}{more}" if self._rows else "no rows"
        return f"Preview({rows}{basis}; as text: .to_text())"

    def _repr_html_(self) -> str:
        fragments = ""
        if self._basis:
            fragments = f'<div style="{_BASIS_CSS}">{html.escape(self._basis)}</div>'
        for row in self._rows:
            title = html.escape(printable(f"{row.outcome()} · {row.place}"))
            fragments += f'<div style="{_TITLE_CSS}"><b>row {row.row_id:,}</b> '
            fragments += f'<span style="opacity:.65">{title}</span></div>'
            if row.encoded is not None:
                fragments += to_html(row.encoded, row.tokenizer)
            else:
                why = "<br>".join(html.escape(printable(line)) for line in _why(row))
                fragments += f'<div style="{_BOX_CSS}"><div style="{_LEGEND_CSS}">{why}</div>'
                fragments += f"{html.escape(printable(row.raw_text()))}</div>"
        return fragments


def _why(row: Row) -> list[str]:
    """Return why a row is dropped, and what to do about it."""
    lines = [f"{row.reason}: {row.say(row.detail)}" if row.detail else str(row.reason)]
    return [*lines, f"What to do: {row.remedy}."]


def as_text(shown: RenderableType, columns: int, *, is_folded: bool = False) -> str:
    """Return what rich would print on a screen of so many columns, without colours.

    Args:
        is_folded: a line that is longer goes on in the next one; else what is shown breaks its own.
    """
    console = Screen(
        file=io.StringIO(), width=columns, markup=False, emoji=False, force_jupyter=False
    )
    console.print(shown, soft_wrap=not is_folded)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


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
