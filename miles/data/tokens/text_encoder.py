"""Text -> token ids, and the token at each character.

    "…assistant\\n4<|im_end|>\\n", [11, 12]  ->  ids, first tokens [4, 5], straddled [False, False]

Texts go through fastokens or tiktoken where that is proven exact (`bpe.py` makes the encoder).
Still, `tokenizers` encodes a text that NFC would change, one that tiktoken gives up on (a million
blanks), and one with a part that lies in no word. It encodes a sample of all others again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, compress, pairwise
from typing import NamedTuple

import numpy as np
import tokenizers

from miles.common.offsets import offsets_of
from miles.data.rejecting import or_rejected
from miles.data.tokens.engines import TOKENIZERS, EngineCore, FastokensCore
from miles.data.tokens.nfc import is_inert
from miles.data.tokens.packed_proof import PackedProof
from miles.data.tokens.sample_check import check_sample
from miles.data.types import Bool, Int32, Int64, RowRejected

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


@dataclass(frozen=True, eq=False)
class JoinedTokens:
    """The tokens of texts that were encoded end to end."""

    numbers: Int64
    """int64 [texts]: which of the texts that were given each is, ascending"""
    ids: Int32
    """int32 [tokens]"""
    text_starts: Int64
    """int64 [texts + 1]: where each text begins, and the end of the last, in characters"""
    token_ends: Int64
    """int64 [tokens]: where each token ends, in bytes"""
    continuations: Int64
    """of all the texts, as `_continuations` returns them"""

    def tokens_at(self, points: Int64) -> tuple[Int64, Bool]:
        """Return the first token at each point or after it, and whether a token straddles it.

        Args:
            points: positions of characters in the texts end to end, of any shape and order.
        """
        if not len(self.ids):
            return np.zeros(points.shape, np.int64), np.zeros(points.shape, np.bool_)
        edges = points
        if len(self.continuations):
            edges = points + self.continuations.searchsorted(points)  # in bytes
        at = self.token_ends.searchsorted(edges)  # the token that ends at an edge, or straddles it
        is_inside = edges > 0
        return (at + 1) * is_inside, (self.token_ends.take(at) != edges) & is_inside

    def ids_of(self, number: int) -> Int32:
        """Return the ids of one of the texts: int32 [tokens]."""
        (begin, end), _ = self.tokens_at(self.text_starts[number : number + 2])
        return self.ids[begin:end]


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer without its chat template."""

    backend: tokenizers.Tokenizer
    """a copy, whose offsets include the blanks of a token"""
    engine: str
    """"fastokens", "tiktoken" or "tokenizers", and why not the faster one"""
    _engine_core: EngineCore | None = None
    """None: `tokenizers` encodes all text"""
    _added: frozenset[str] = frozenset()
    _token_bytes: Int64 | None = None
    """int64 [vocabulary]: bytes of each token"""
    _max_token_bytes: int = 0
    _has_normalizer: bool = False
    proof: PackedProof | None = None
    """what the engine is made of; None: `tokenizers` encodes all text"""

    @property
    def kind(self) -> str:
        """The engine: "fastokens", "tiktoken" or "tokenizers"."""
        return TOKENIZERS if self._engine_core is None else self._engine_core.kind

    def make_engine(self) -> None:
        """Make the engine now, in a process that will encode much; else it is made as it pays.

        Raises:
            Inexact: the engine does not take what was proven.
        """
        if isinstance(self._engine_core, FastokensCore):
            self._engine_core.make()

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
        if self._engine_core is not None and (text.isascii() or self._are_normal([text])[0]):
            tokens = self._encode_alone(text, points)
            if tokens is not None:
                return tokens
        by_backend = self._encode_by_backend(text, points)
        if isinstance(by_backend, RowRejected):
            raise by_backend
        return by_backend

    def encode_all(
        self, texts: Sequence[str], points: Sequence[Sequence[int]]
    ) -> list[Tokens | RowRejected]:
        """Encode many texts as `encode_at` does; what it would raise is in its text's place.

        Texts that begin with an added token go through tiktoken end to end, in one call: no merge
        crosses an added token.
        """
        begins_new = [text.startswith(self._openings) for text in texts]
        together = [number for number, is_new in enumerate(begins_new) if is_new]
        groups = [together, *([number] for number, is_new in enumerate(begins_new) if not is_new)]

        encoded: dict[int, Tokens] = {}
        for group in groups:
            joined = self.join([texts[number] for number in group])
            if joined is not None:
                numbers = [group[number] for number in joined.numbers.tolist()]
                encoded |= _by_text(joined, numbers, [points[number] for number in numbers])

        return [
            encoded[number] if number in encoded else self._encode_by_backend(text, points[number])
            for number, text in enumerate(texts)
        ]

    @property
    def joins(self) -> bool:
        """Return whether texts can be encoded end to end: there is an engine beside `tokenizers`."""
        return self._engine_core is not None

    def join(self, texts: Sequence[str]) -> JoinedTokens | None:
        """Encode texts end to end, in one call of the engine.

        Args:
            texts: each but the first begins with an added token (`opens`).

        Returns:
            The tokens, without the texts that the engine must not encode. None: it encodes none of
            them.
        """
        if self._engine_core is None:
            return None
        is_normal = self._are_normal(texts)
        normal = list(compress(texts, is_normal))
        text = "".join(normal)
        ids = self._engine_core.ids(text)
        if ids is None:
            return None

        # What the engine drops is in no word; then nothing is known of where the tokens lie.
        assert self._token_bytes is not None
        token_ends = self._token_bytes.take(ids).cumsum()
        continuations = _continuations(text)
        num_bytes = len(text) + len(continuations)
        if num_bytes != (token_ends[-1] if len(ids) else 0):
            return None

        text_lengths = np.fromiter(map(len, normal), np.int64, len(normal))
        numbers = np.flatnonzero(is_normal)
        joined = JoinedTokens(numbers, ids, offsets_of(text_lengths), token_ends, continuations)
        self.check_sample(normal, joined.ids_of)
        return joined

    def opens(self, text: str) -> bool:
        """Return whether a text begins with an added token: no merge crosses its start."""
        return text.startswith(self._openings)

    def is_surely_longer(self, text: str, num_tokens: int) -> bool:
        """Return whether the length of a text alone says that it has more tokens than that."""
        limit = self.max_characters(num_tokens)
        if limit is None or len(text) <= limit:  # most texts
            return False
        shrinks = 1 if text.isascii() or not self._has_normalizer else _NFC_SHRINKS
        return len(text) > limit * shrinks

    def max_characters(self, num_tokens: int) -> int | None:
        """Return how long a text of that many tokens can be, unless it is normalized; None: any."""
        return None if self._engine_core is None else num_tokens * self._max_token_bytes

    def check_sample(self, texts: Sequence[str], ids_of: Callable[[int], Int32]) -> None:
        """Compare a sample of what the engine encoded with `tokenizers`.

        Args:
            texts: that were encoded together.
            ids_of: number of a text -> its ids, int32 [tokens].

        Raises:
            RunError: the ids differ.
        """
        assert self.proof is not None
        check_sample(self.backend, self.proof.added, self.kind, texts, ids_of)

    def _encode_alone(self, text: str, points: Sequence[int]) -> Tokens | None:
        """Encode one text by the engine; None where it cannot."""
        assert self._engine_core is not None
        ids = self._engine_core.ids(text)
        if ids is None:
            return None
        assert self._token_bytes is not None
        # As lists: a text has few tokens, and a call of numpy costs as much as twenty of them.
        token_ends: list[int] = self._token_bytes.take(ids).cumsum().tolist()
        is_ascii = text.isascii()
        num_bytes = len(text) if is_ascii else len(text.encode())
        if num_bytes != (token_ends[-1] if token_ends else 0):  # see `join`
            return None
        self.check_sample([text], lambda _: ids)

        first, straddled = [], []
        for edge in points if is_ascii else _byte_offsets(text, points):
            at = bisect_left(token_ends, edge) if edge else -1  # the token that ends there
            first.append(at + 1)
            straddled.append(at >= 0 and token_ends[at] != edge)
        return Tokens(ids, first, straddled)

    def _are_normal(self, texts: Sequence[str]) -> list[bool]:
        """Return for each text whether the normalizer leaves it as it is."""
        is_ascii = list(map(str.isascii, texts))
        if not self._has_normalizer or all(is_ascii):
            return [True] * len(texts)

        others = [text for text, is_plain in zip(texts, is_ascii, strict=True) if not is_plain]
        if is_inert(others):  # most texts
            return [True] * len(texts)
        return [
            is_plain or is_inert([text]) or self._is_normal(text)
            for text, is_plain in zip(texts, is_ascii, strict=True)
        ]

    def _is_normal(self, text: str) -> bool:
        try:
            return bool(self.backend.normalizer.normalize_str(text) == text)
        except ValueError:  # half of a surrogate pair
            return False

    def _encode_by_backend(self, text: str, points: Sequence[int]) -> Tokens | RowRejected:
        encoding = or_rejected(encode_by, self.backend, text)
        if isinstance(encoding, RowRejected):
            return encoding
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


def _byte_offsets(text: str, points: Sequence[int]) -> list[int]:
    """Return the bytes before each point; the points are ascending."""
    offsets = []
    at = num_bytes = 0
    for point in points:
        num_bytes += len(text[at:point].encode())
        offsets.append(num_bytes)
        at = point
    return offsets


def _continuations(text: str) -> Int64:
    """Return for each byte of a text that does not begin a character the number of its character.

    int64, ascending: "h\u00e9" has one such byte, of character 1.
    """
    if text.isascii():
        return np.zeros(0, np.int64)
    utf8 = np.frombuffer(text.encode(), np.int8)
    places = np.flatnonzero(utf8 < -0x40)  # 10xxxxxx, as a signed number
    places -= np.arange(1, len(places) + 1)
    return places


def _by_text(
    joined: JoinedTokens, numbers: Sequence[int], points: Sequence[Sequence[int]]
) -> dict[int, Tokens]:
    """Cut tokens that lie end to end into those of each text.

    Args:
        numbers: of the texts, as the result names them.
        points: of each text.
    """
    num_points = list(map(len, points))
    text_starts = joined.text_starts
    starts = np.repeat(text_starts[:-1], num_points)
    places = starts + np.fromiter(chain.from_iterable(points), np.int64, len(starts))
    first, straddled = joined.tokens_at(places)
    token_starts, _ = joined.tokens_at(text_starts)
    first -= np.repeat(token_starts[:-1], num_points)

    tokens: dict[int, Tokens] = {}
    point_offsets = offsets_of(num_points).tolist()
    spans = zip(pairwise(token_starts.tolist()), pairwise(point_offsets), strict=True)
    for number, ((begin, end), (first_point, last_point)) in zip(numbers, spans, strict=True):
        of_text = slice(first_point, last_point)
        tokens[number] = Tokens(
            joined.ids[begin:end], first[of_text].tolist(), straddled[of_text].tolist()
        )
    return tokens
