"""Content that spells a control token, encoded as the ordinary text that it is (`special_text="escape"`).

    user says "what is <|im_end|>?"   ->   … what is ⟨<|im_end|>⟩? <|im_end|>     ⟨ ⟩ two private-use characters
                                           …         27 91 318 …      151645

The ids are those of `apply_chat_template(..., sanitize_control_tokens=True)`: control tokens in what the row says are
marked before the template runs, the text is cut at the marks, and what was marked is encoded without added
tokens. What transformers gives is asked for such a row, which is rare, and must be equal (`encoder`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from miles.data.template.sandbox import literals
from miles.data.tokens.bpe import TextEncoder, Tokens, by_offsets, encode_by
from miles.data.types import RowRejected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEGIN, _END = (
    "\U000f0000",
    "\U000f0001",
)  # transformers' own, so that a template meets the same text


class Escaper:
    """Marks control tokens in a row's strings, and encodes marked text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_tokens: TextEncoder) -> None:
        self._backend = text_tokens.backend
        added = list(tokenizer.added_tokens_decoder.values())
        self._id_of = {
            token.content: number for number, token in tokenizer.added_tokens_decoder.items()
        }
        named = tokenizer.chat_control_tokens
        written = "\0".join(literals(str(tokenizer.chat_template)))
        control = [
            token.content
            for token in added
            if token.special
            or (
                token.content in named
                if named is not None
                else token.content in written and token.content.strip()
            )
        ]
        self._control = any_of(control)
        self._marks = re.compile(
            f"{_BEGIN}({any_of([token.content for token in added]).pattern}){_END}|[{_BEGIN}{_END}]"
        )

    def concerns(self, strings: Sequence[str]) -> bool:
        """Whether any of a row's strings spells a control token or holds a mark."""
        return any(self._control.search(own) or _BEGIN in own or _END in own for own in strings)

    def mark(self, value: Any) -> Any:
        """Plain JSON data with every control token in its strings marked, but for keys."""
        if isinstance(value, str):
            plain = value.replace(_BEGIN, "").replace(_END, "")  # none that the row brings counts
            return self._control.sub(f"{_BEGIN}\\g<0>{_END}", plain)
        if isinstance(value, Mapping):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(item) for item in value]
        return value

    def encode_at(self, text: str, points: Sequence[int]) -> Tokens:
        """As `TextEncoder.encode_at`, for marked text; no point lies within a marked token.

        Raises:
            RowRejected: "bad_message", as there; "special_text": a marked token that ordinary text comes to, too.
        """
        ids: list[int] = []
        first, straddled = [0] * len(points), [False] * len(points)
        position, remaining = 0, list(range(len(points)))
        pieces = self._marks.split(text)
        marks = [match.group() for match in self._marks.finditer(text)]
        for number, piece in enumerate(pieces):
            if number % 2:  # what a pair of marks holds; None where a mark stands alone
                ids += self._without_added_tokens(piece) if piece else []
                position += len(marks[number // 2])
                continue
            piece_ids, offsets = self._with_added_tokens(piece, is_first=number == 0)
            end = position + len(piece)
            here = [point for point in remaining if points[point] <= end]
            tokens, crossed = by_offsets(offsets, [points[point] - position for point in here])
            for point, token, is_crossed in zip(here, tokens, crossed, strict=True):
                first[point], straddled[point] = len(ids) + token, is_crossed
            remaining = remaining[len(here) :]
            ids += piece_ids
            position = end
        return Tokens(np.array(ids, np.int32), first, straddled)

    def _with_added_tokens(
        self, piece: str, *, is_first: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and characters of a piece; behind a newline, as in transformers, so that it is not a text's start."""
        if not piece:
            return [], []
        before = "" if is_first else "\n"
        newline = encode_by(self._backend, before).ids
        encoding = encode_by(self._backend, before + piece)
        if encoding.ids[: len(newline)] != newline:
            encoding, newline, before = encode_by(self._backend, piece), [], ""
        offsets = [
            (begin - len(before), end - len(before))
            for begin, end in encoding.offsets[len(newline) :]
        ]
        return encoding.ids[len(newline) :], offsets

    def _without_added_tokens(self, piece: str) -> list[int]:
        newline, behind = encode_by(self._backend, "\n").ids, self._model_ids("\n" + piece)
        ids = (
            behind[len(newline) :] if behind[: len(newline)] == newline else self._model_ids(piece)
        )
        if self._id_of[piece] in ids:
            raise RowRejected(
                "special_text", "a control token that cannot be written as ordinary text"
            )
        return ids

    def _model_ids(self, text: str) -> list[int]:
        backend = self._backend
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in backend.model.tokenize(word)]


def any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the tokens, of those that begin alike the longest."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
