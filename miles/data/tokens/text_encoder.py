"""Text -> token ids, and the token at each character.

    "…assistant\\n4<|im_end|>\\n", [11, 12]  ->  ids, first tokens [4, 5], straddled [False, False]

Texts go through tiktoken where that is proven exact (`bpe.py` makes the encoder). Still,
`tokenizers` encodes a text that NFC would change, one that tiktoken gives up on (a million blanks),
and one with a part that lies in no word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from miles.data.tokens.packed_proof import PackedProof
from miles.data.types import Int32, Int64, RowRejected

_NFC_SHRINKS = 3
"""A text of n bytes in NFC had at most 3 n bytes before: three Hangul letters become a syllable."""


class Tokens(NamedTuple):
    """The tokens of a text."""

    ids: Int32
    """int32 [tokens]"""
    first: list[int]
    """for each point the first token that begins there or after it"""
    straddled: list[bool]
    """for each point whether a token that begins before it ends after it"""


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer without its chat template."""

    backend: tokenizers.Tokenizer
    """a copy, whose offsets include the blanks of a token"""
    engine: str
    """"tiktoken", or "tokenizers: " and the reason"""
    _bpe: Any = None
    """tiktoken's core, which takes (text, allowed special tokens)"""
    _added: frozenset[str] = frozenset()
    _token_bytes: Int64 | None = None
    """int64 [vocabulary]: bytes of each token"""
    _max_token_bytes: int = 0
    _has_normalizer: bool = False
    proof: PackedProof | None = None
    """what the engine is made of; None: `tokenizers` encodes all text"""

    @cached_property
    def _openings(self) -> tuple[str, ...]:
        return tuple(self._added)

    def encode(self, text: str) -> Int32:
        """Return what `tokenizer(text, add_special_tokens=False)` gives: int32 [tokens].

        Raises:
            RowRejected: "bad_message": half of a surrogate pair, which is no text; or text that the
                tokenizer fails on.
        """
        return self.encode_at(text, ()).ids

    def encode_at(self, text: str, points: Sequence[int]) -> Tokens:
        """Encode a text, and find tokens by character.

        Args:
            text: any.
            points: positions of characters, ascending.

        Raises:
            RowRejected: as in `encode`.
        """
        (tokens,) = self.encode_all([text], [points])
        if isinstance(tokens, RowRejected):
            raise tokens
        return tokens

    def encode_all(
        self, texts: Sequence[str], points: Sequence[Sequence[int]]
    ) -> list[Tokens | RowRejected]:
        """Encode many texts as `encode_at` does; what it would raise is in its text's place.

        Texts that begin with an added token go through tiktoken end to end, in one call: no merge
        crosses an added token.
        """
        encoded: dict[int, Tokens] = {}
        if self._bpe is not None:
            for numbers in self._groups(texts):
                encoded |= self._encode_together(texts, points, numbers)

        return [
            encoded[number] if number in encoded else self._encode_by_backend(text, points[number])
            for number, text in enumerate(texts)
        ]

    def is_surely_longer(self, text: str, num_tokens: int) -> bool:
        """Return whether the length of a text alone says that it has more tokens than that."""
        limit = num_tokens * self._max_token_bytes
        if self._bpe is None or len(text) <= limit:  # most texts
            return False
        shrinks = 1 if text.isascii() or not self._has_normalizer else _NFC_SHRINKS
        return len(text) > limit * shrinks

    def _groups(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the numbers of texts to encode together: all that begin with an added token."""
        together: list[int] = []
        groups = [together]
        for number, text in enumerate(texts):
            if text.startswith(self._openings):
                together.append(number)
            else:
                groups.append([number])
        return groups

    def _encode_together(
        self, texts: Sequence[str], points: Sequence[Sequence[int]], numbers: Sequence[int]
    ) -> dict[int, Tokens]:
        """Encode the texts of these numbers by tiktoken, end to end in one call.

        Returns:
            Number -> tokens. A text that tiktoken must not encode is missing; all are, if it fails.
        """
        normal = [number for number in numbers if self._is_normal(texts[number])]
        ids = self._tiktoken_ids("".join([texts[number] for number in normal]))
        if ids is None:
            return {}

        assert self._token_bytes is not None
        ends = self._token_bytes[ids].cumsum()
        edges = _byte_edges([(texts[number], points[number]) for number in normal])
        num_bytes = edges[-1] if edges else 0
        if num_bytes != (ends[-1] if len(ends) else 0):  # it dropped what is in no word
            return {}

        first, straddled = _tokens_at(ends, edges)
        return _by_text(ids, first, straddled, {number: len(points[number]) for number in normal})

    def _tiktoken_ids(self, text: str) -> Int32 | None:
        """Return the ids that tiktoken gives; None if it gives up."""
        try:
            buffer = self._bpe.encode_to_tiktoken_buffer(text, self._added)
        except ValueError:
            # Not Unicode; or (tiktoken 0.14) the stack of fancy-regex is full, at a million blanks.
            return None
        return np.frombuffer(buffer, np.uint32).astype(np.int32)

    def _is_normal(self, text: str) -> bool:
        """Return whether the normalizer leaves the text as it is."""
        if text.isascii() or not self._has_normalizer:
            return True
        try:
            return bool(self.backend.normalizer.normalize_str(text) == text)
        except ValueError:  # half of a surrogate pair
            return False

    def _encode_by_backend(self, text: str, points: Sequence[int]) -> Tokens | RowRejected:
        try:
            encoding = encode_by(self.backend, text)
        except RowRejected as rejected:
            return rejected
        return Tokens(np.array(encoding.ids, np.int32), *by_offsets(encoding.offsets, points))


def encode_by(backend: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    """Encode a text by `tokenizers`, without the special tokens that are put around a text.

    Raises:
        RowRejected: "bad_message": half of a surrogate pair, or text that the tokenizer fails on.
    """
    try:
        return backend.encode(text, add_special_tokens=False)
    except TypeError as error:
        raise RowRejected("bad_message", "text that is not Unicode (a lone surrogate)") from error
    except BaseException as error:
        # tokenizers 0.23: Oniguruma gives up after 10 million steps back, as in a run of that many
        # blanks, and Rust panics.
        if type(error).__name__ != "PanicException":
            raise
        raise RowRejected(
            "bad_message", "text that the tokenizer fails on (a run of millions of blanks)"
        ) from error


def by_offsets(
    offsets: Sequence[tuple[int, int]], points: Sequence[int]
) -> tuple[list[int], list[bool]]:
    """Return the first tokens and straddled points as `encode_at` does.

    Args:
        offsets: (begin, end) of each token, in characters.
    """
    begins = np.array([begin for begin, _ in offsets], np.int64)
    first: list[int] = begins.searchsorted(points).tolist()
    return first, [
        token > 0 and offsets[token - 1][1] > point
        for token, point in zip(first, points, strict=True)
    ]


def _byte_edges(texts: Sequence[tuple[str, Sequence[int]]]) -> list[int]:
    """Return where the points and the end of each text lie, in bytes of all texts end to end.

    Args:
        texts: a text, and positions of characters in it, ascending.
    """
    edges: list[int] = []
    begin = 0
    for text, points in texts:
        if text.isascii():
            edges += [begin + point for point in points]
            begin += len(text)
        else:
            edges += [begin + offset for offset in _byte_offsets(text, points)]
            begin += len(text.encode())
        edges.append(begin)
    return edges


def _byte_offsets(text: str, points: Sequence[int]) -> list[int]:
    offsets = []
    at = num_bytes = 0
    for point in points:
        num_bytes += len(text[at:point].encode())
        offsets.append(num_bytes)
        at = point
    return offsets


def _tokens_at(ends: Int64, edges: list[int]) -> tuple[list[int], list[bool]]:
    """Return the first token that begins at each edge or after it, and whether one straddles it.

    Args:
        ends: int64 [tokens]: where each token ends, in bytes.
        edges: ascending, none after the last end.
    """
    at = ends.searchsorted(edges)  # the token that ends at an edge, or straddles it
    is_over = (ends[at] != edges).tolist() if len(ends) else [False] * len(edges)
    first = [token + 1 if edge else 0 for token, edge in zip(at.tolist(), edges, strict=True)]
    straddled = [over and edge > 0 for over, edge in zip(is_over, edges, strict=True)]
    return first, straddled


def _by_text(
    ids: Int32, first: list[int], straddled: list[bool], num_points: Mapping[int, int]
) -> dict[int, Tokens]:
    """Cut the tokens of texts that lie end to end into those of each.

    Args:
        first, straddled: for the points and the end of each text, as `_tokens_at` returns them.
        num_points: number of each text, in order -> how many points it has.
    """
    tokens: dict[int, Tokens] = {}
    edge = begin = 0
    for number, count in num_points.items():
        last_edge = edge + count  # the text's end
        end = first[last_edge]
        of_points = [token - begin for token in first[edge:last_edge]]
        tokens[number] = Tokens(ids[begin:end], of_points, straddled[edge:last_edge])
        edge = last_edge + 1
        begin = end
    return tokens
