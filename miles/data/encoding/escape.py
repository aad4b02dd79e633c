"""Encodes content that spells a control token as ordinary text (`special_text="escape"`).

    the user types            what is <|im_end|>?
    marked, before rendering  what is ⟨<|im_end|>⟩?         ⟨ ⟩: two private-use characters
    rendered                  … what is ⟨<|im_end|>⟩? <|im_end|>
    ids                       …         27 91 318 …   151645

Control tokens in a row's strings are marked before the template runs. The rendered text is cut at
the marks. The text between a pair of marks is encoded without added tokens, the rest as usual.

Invariant: the ids are those of `apply_chat_template(..., sanitize_control_tokens=True)`. Such rows
are few, and `encoder.py` compares each one with transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from miles.data.template.sandbox import literals
from miles.data.tokens.text_encoder import TextEncoder, Tokens, by_offsets, encode_by
from miles.data.types import RowRejected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# transformers' own marks, so that a template gets the same text from both.
_BEGIN = "\U000f0000"
_END = "\U000f0001"


class Escaper:
    """Marks control tokens in a row's strings, and encodes marked text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_encoder: TextEncoder) -> None:
        self._backend = text_encoder.backend
        self._id_of = {
            token.content: number for number, token in tokenizer.added_tokens_decoder.items()
        }
        self._control = any_of(_control_tokens(tokenizer))
        added = any_of(list(self._id_of)).pattern
        self._marks = re.compile(f"{_BEGIN}({added}){_END}|[{_BEGIN}{_END}]")

    def is_needed_for(self, strings: Sequence[str]) -> bool:
        """Return whether any of a row's strings spells a control token, or holds a mark."""
        return any(self._control.search(text) or _BEGIN in text or _END in text for text in strings)

    def mark(self, value: Any) -> Any:
        """Return plain JSON data with every control token in its strings marked; keys stay."""
        if isinstance(value, str):
            plain = value.replace(_BEGIN, "").replace(_END, "")  # marks that the row itself holds
            return self._control.sub(f"{_BEGIN}\\g<0>{_END}", plain)
        if isinstance(value, Mapping):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(item) for item in value]
        return value

    def encode_at(self, text: str, points: Sequence[int]) -> Tokens:
        """Encode marked text, as `TextEncoder.encode_at` encodes any text.

        Args:
            points: characters of `text`, ascending; none lies within a marked token.

        Raises:
            RowRejected: "bad_message", as there; "special_text": a marked token that ordinary text
                comes to as well.
        """
        ids: list[int] = []
        first = [0] * len(points)
        straddled = [False] * len(points)
        position = 0
        remaining = list(range(len(points)))

        # `split` gives, in turn, text and the inside of a pair of marks (None: a single mark).
        pieces = self._marks.split(text)
        marks = [match.group() for match in self._marks.finditer(text)]
        for number, piece in enumerate(pieces):
            is_marked = number % 2 == 1
            if is_marked:
                ids += self._without_added_tokens(piece) if piece else []
                position += len(marks[number // 2])
                continue

            piece_ids, offsets = self._with_added_tokens(piece, is_first=number == 0)
            end = position + len(piece)
            here = [point for point in remaining if points[point] <= end]
            tokens, crossed = by_offsets(offsets, [points[point] - position for point in here])
            for point, token, is_crossed in zip(here, tokens, crossed, strict=True):
                first[point] = len(ids) + token
                straddled[point] = is_crossed
            remaining = remaining[len(here) :]
            ids += piece_ids
            position = end

        return Tokens(np.array(ids, np.int32), first, straddled)

    def _with_added_tokens(
        self, piece: str, *, is_first: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a piece, and the characters of each.

        As in transformers, a newline is put before a piece that does not begin the text, so that
        the tokenizer does not take it for the start of one; its ids are cut off again.
        """
        if not piece:
            return [], []

        before = "" if is_first else "\n"
        newline = encode_by(self._backend, before).ids
        encoding = encode_by(self._backend, before + piece)
        if encoding.ids[: len(newline)] != newline:  # merged with the piece
            before = ""
            newline = []
            encoding = encode_by(self._backend, piece)

        offsets = [
            (begin - len(before), end - len(before))
            for begin, end in encoding.offsets[len(newline) :]
        ]
        return encoding.ids[len(newline) :], offsets

    def _without_added_tokens(self, piece: str) -> list[int]:
        """Return the ids of a marked token as ordinary text; a newline goes before it, as above."""
        newline = encode_by(self._backend, "\n").ids
        ids = self._model_ids("\n" + piece)
        ids = ids[len(newline) :] if ids[: len(newline)] == newline else self._model_ids(piece)
        if self._id_of[piece] in ids:
            raise RowRejected(
                "special_text", "a control token that cannot be written as ordinary text"
            )
        return ids

    def _model_ids(self, text: str) -> list[int]:
        """Encode by the tokenizer's normalizer, pre-tokenizer and model alone."""
        backend = self._backend
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]

        ids: list[int] = []
        for word in words:
            ids += [token.id for token in backend.model.tokenize(word)]
        return ids


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens that transformers escapes.

    These are the special tokens, and beside them the tokenizer's `chat_control_tokens`, or where it
    names none, every added token that the chat template writes.
    """
    named = tokenizer.chat_control_tokens
    written = "\0".join(literals(str(tokenizer.chat_template)))

    def is_control(token: Any) -> bool:
        if token.special:
            return True
        if named is not None:
            return token.content in named
        return token.content in written and bool(token.content.strip())

    return [token.content for token in tokenizer.added_tokens_decoder.values() if is_control(token)]


def any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the tokens; the longest of those that begin alike."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
