"""Text -> token ids, and which token lies at a character: through tiktoken where that is proven exact.

    "…assistant\\n4<|im_end|>\\n", [11, 12]  ->  ids, first tokens [4, 5], straddled [False, False]

A byte-level BPE tokenizer of Hugging Face and tiktoken's differ in what decides a merge: there a list of pairs, here
the id of the result. They give the same ids for every text if (`_convert`)

- the merges are in the order of the ids that they make, and for every token the merges of lower rank alone join
  its bytes to two parts that are one of its listed pairs (then no token can arise in another way), or whole words
  are looked up first by both (`ignore_merges`);
- the text is cut into words by one regular expression, and the normalizer is NFC or none. A text that NFC changes
  goes through `tokenizers`, row by row;
- added tokens are matched alike: no two can overlap in a text, none takes the blanks around it.

What cannot be proven, that both regex engines cut alike, is tried at load on every added token, random Unicode, code,
runs of blanks and digits; for Qwen's pattern a test tries every code point. A tokenizer that fails any of it is
used as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import tiktoken
import tokenizers
import xxhash

from miles.data.types import Int32, Int64, RowRejected

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `tokenizers`' ByteLevel pre-tokenizer cuts by where it is asked to."""

_NFC_SHRINKS = 3
"""A text of n bytes in NFC had at most 3 n bytes before (three Hangul letters that become one syllable)."""

_MAX_ADDED_TOKENS = 2_000

_SELF_TEST_SEED = 20_260_101


class _Inexact(Exception):
    """Why a tokenizer is not used through tiktoken."""


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer without its chat template."""

    backend: tokenizers.Tokenizer
    engine: str
    """"tiktoken", or "tokenizers: " and why"""
    _bpe: Any = None
    """tiktoken's core, which takes (text, allowed special tokens)"""
    _added: frozenset[str] = frozenset()
    _token_bytes: Int64 | None = None
    """int64 [vocabulary]: bytes of each token"""
    _max_token_bytes: int = 0
    _has_normalizer: bool = False

    @property
    def is_exact_tiktoken(self) -> bool:
        return self._bpe is not None

    def encode(self, text: str) -> Int32:
        """int32 [tokens]: what `tokenizer(text, add_special_tokens=False)` gives.

        Raises:
            RowRejected: "bad_message": half of a surrogate pair, which is no text.
        """
        return self.encode_at(text, ())[0]

    def encode_at(self, text: str, points: Sequence[int]) -> tuple[Int32, list[int], list[bool]]:
        """Encodes, and finds tokens by character.

        Args:
            text: any.
            points: positions of characters, ascending.

        Returns:
            int32 [tokens] ids; for each point the first token that begins there or behind it, and whether a token
            that begins before it ends behind it.

        Raises:
            RowRejected: as in `encode`.
        """
        try:
            if self._bpe is not None and self._is_normal(text):
                buffer = self._bpe.encode_to_tiktoken_buffer(text, self._added)
                ids = np.frombuffer(buffer, np.uint32).astype(np.int32)
                return ids, *self._by_bytes(text, ids, points)
            encoding = self.backend.encode(text, add_special_tokens=False)
        except (UnicodeError, TypeError) as error:
            raise RowRejected("bad_message", "text that is not Unicode (a lone surrogate)") from error
        return np.array(encoding.ids, np.int32), *by_offsets(encoding.offsets, points)

    def is_surely_longer(self, text: str, num_tokens: int) -> bool:
        """Whether a text has more tokens than that, if its length alone says so; False where it does not."""
        if self._bpe is None:
            return False
        shrinks = 1 if text.isascii() or not self._has_normalizer else _NFC_SHRINKS
        return len(text) > num_tokens * self._max_token_bytes * shrinks

    def _is_normal(self, text: str) -> bool:
        return not self._has_normalizer or text.isascii() or self.backend.normalizer.normalize_str(text) == text

    def _by_bytes(self, text: str, ids: Int32, points: Sequence[int]) -> tuple[list[int], list[bool]]:
        if not points:
            return [], []
        assert self._token_bytes is not None
        offsets = points if text.isascii() else _byte_offsets(text, points)
        ends = self._token_bytes[ids].cumsum()
        first: list[int] = ends.searchsorted(offsets).tolist()
        straddled = []
        for number, offset in enumerate(offsets):
            token = first[number]
            is_edge = offset == 0 or (token < len(ends) and ends[token] == offset)
            if offset > 0:
                first[number] += 1
            straddled.append(not is_edge)
        return first, straddled


def by_offsets(offsets: Sequence[tuple[int, int]], points: Sequence[int]) -> tuple[list[int], list[bool]]:
    """As `encode_at` returns them, from (begin, end) characters of each token."""
    begins = np.array([begin for begin, _ in offsets], np.int64)
    first: list[int] = begins.searchsorted(points).tolist()
    return first, [token > 0 and offsets[token - 1][1] > point for token, point in zip(first, points, strict=True)]


def _byte_offsets(text: str, points: Sequence[int]) -> list[int]:
    offsets, at, num_bytes = [], 0, 0
    for point in points:
        num_bytes += len(text[at:point].encode())
        offsets.append(num_bytes)
        at = point
    return offsets


_made: dict[str, TextEncoder] = {}


def text_encoder(backend: tokenizers.Tokenizer) -> TextEncoder:
    """The encoder for a tokenizer: made and tried once a process for each content, not each object."""
    definition = backend.to_str()
    key = xxhash.xxh3_128_hexdigest(definition.encode("utf-8", "surrogatepass"))
    if key not in _made:
        own = tokenizers.Tokenizer.from_str(definition)  # nobody else's changes reach a copy
        own.no_truncation()
        own.no_padding()
        try:
            encoder = _convert(own, json.loads(definition))
            _try_out(encoder)
        except _Inexact as reason:
            encoder = TextEncoder(own, f"tokenizers: {reason}")
        _made[key] = encoder
    return _made[key]


def _convert(backend: tokenizers.Tokenizer, definition: Mapping[str, Any]) -> TextEncoder:
    model = definition["model"]
    if model.get("type") != "BPE":
        raise _Inexact(f"its model is {model.get('type')}, not byte-level BPE")
    for option in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise _Inexact(f"its model has {option}")
    normalizer = definition["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _Inexact(f"its normalizer is {normalizer['type']}")
    words = _word_pattern(definition["pre_tokenizer"])
    vocabulary: dict[str, int] = model["vocab"]
    ranks = _byte_ranks(vocabulary)
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    _require_same_merges(vocabulary, merges, bool(model.get("ignore_merges")))
    added = _added_tokens(definition["added_tokens"])
    # A token of the model that is listed as added too is matched as an added one, before any merge.
    ranks = {token: rank for token, rank in ranks.items() if rank not in added.values()}
    try:
        encoding = tiktoken.Encoding(
            "miles", pat_str=words, mergeable_ranks=ranks, special_tokens=added, explicit_n_vocab=None
        )
    except Exception as error:  # whatever its Rust side makes of a pattern it does not know
        raise _Inexact(f"tiktoken does not take it ({type(error).__name__})") from error
    token_bytes = np.zeros(max([*ranks.values(), *added.values()]) + 1, np.int64)
    for token, rank in ranks.items():
        token_bytes[rank] = len(token)
    for text, rank in added.items():
        token_bytes[rank] = len(text.encode())
    return TextEncoder(
        backend,
        "tiktoken",
        encoding._core_bpe,
        frozenset(added),
        token_bytes,
        int(token_bytes.max()),
        _has_normalizer=normalizer is not None,
    )


def _word_pattern(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """The one regular expression that cuts text into words."""
    steps = [pre_tokenizer] if pre_tokenizer else []
    if pre_tokenizer and pre_tokenizer["type"] == "Sequence":
        steps = list(pre_tokenizer["pretokenizers"])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise _Inexact("it is not byte-level, or puts a blank before text")
    if len(steps) == 1 and steps[0]["use_regex"]:
        return _GPT2_WORDS
    if len(steps) == 2 and steps[0]["type"] == "Split" and not steps[1]["use_regex"]:
        split = steps[0]
        if split["behavior"] == "Isolated" and not split["invert"] and "Regex" in split["pattern"]:
            return str(split["pattern"]["Regex"])
    raise _Inexact("it cuts text into words in several steps")


def _byte_ranks(vocabulary: Mapping[str, int]) -> dict[bytes, int]:
    """Tokens as bytes -> ids. ByteLevel writes each byte as a printable character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    try:
        ranks = {bytes(byte_of[character] for character in token): rank for token, rank in vocabulary.items()}
    except KeyError as error:
        raise _Inexact("a token of its vocabulary is not made of bytes") from error
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise _Inexact("its vocabulary lacks some bytes")
    return ranks


def _require_same_merges(vocabulary: Mapping[str, int], merges: Sequence[Any], looks_up_words: bool) -> None:
    """Tokens that arise by the listed merges are those that arise by rank (see the module's docstring)."""
    pairs: dict[int, set[tuple[str, str]]] = {}
    results = []
    for merge in merges:
        result = vocabulary.get("".join(merge))
        if len(merge) != 2 or result is None:
            raise _Inexact("a merge makes no token of its vocabulary")
        results.append(result)
        pairs.setdefault(result, set()).add(merge)
    if any(earlier > later for earlier, later in pairwise(results)):
        raise _Inexact("its merges are not in the order of their results' ids")
    for token, rank in vocabulary.items():
        if len(token) == 1:
            continue
        parts = list(token)
        while len(parts) > 2:
            best, at = rank, -1
            for position in range(len(parts) - 1):
                joined = vocabulary.get(parts[position] + parts[position + 1], rank)
                if joined < best:
                    best, at = joined, position
            if at < 0:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) != 2:
            if looks_up_words:
                continue  # only as a whole word, by both
            raise _Inexact("a token of its vocabulary cannot arise by merges")
        if tuple(parts) not in pairs.get(rank, ()):
            raise _Inexact("a token of its vocabulary arises by rank, but by none of its merges")


def _added_tokens(added: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    tokens = {token["content"]: int(token["id"]) for token in added}
    for token in added:
        if token["single_word"] or token["lstrip"] or token["rstrip"]:
            raise _Inexact("an added token takes the blanks around it, or only whole words")
    if len(tokens) > _MAX_ADDED_TOKENS or "" in tokens:
        raise _Inexact(f"it has {len(tokens)} added tokens")
    if any(_can_overlap(one, other) for one in tokens for other in tokens):
        raise _Inexact("two added tokens can overlap in a text")
    return tokens


def _can_overlap(one: str, other: str) -> bool:
    """Whether a text can hold both so that they share characters."""
    ends = range(1, min(len(one), len(other)) + (one != other))
    return (one != other and other in one) or any(one[-length:] == other[:length] for length in ends)


def _try_out(encoder: TextEncoder) -> None:
    for text in _self_test_texts(sorted(encoder._added)):
        points = list(range(0, len(text) + 1, 3))
        encoding = encoder.backend.encode(text, add_special_tokens=False)
        ids, first, straddled = encoder.encode_at(text, points)
        if ids.tolist() != encoding.ids or (first, straddled) != by_offsets(encoding.offsets, points):
            raise _Inexact("tiktoken gave other ids in a self-test")


def _self_test_texts(added: Sequence[str]) -> Iterator[str]:
    yield from (
        "",
        "def f(x):\n\treturn {'a': x[0] ** 2, \"b\": not x}  # don't\r\n\r\n\n  if __name__ == '__main__':\n    f(1)\n",
        "It's we'll I'M YOU'RE he'd 'S 'ſ 'K's ''s 've\u00a0'T",
        "e\u0301 \u1100\u1161\u11a8 \u212b \u0958 ﬁ İ ß ǅ ½ ² Ⅷ ٣ 三 \u200b\u200d \ufeff \ufffd \ufdd0 \U0010ffff",
        "法国的首都是哪里？ 日本語のテキスト 한국어 हिन्दी العربية ไทย 👩‍👩‍👧 🇩🇪 ☕️",
        "x\u0085y\u2028z\u2029\u000b\u000c\u001c\u3000\u1680\u180e.",
        *(
            "".join(blank * count + "a" for count in (1, 2, 3, 5, 8, 13, 40))
            for blank in (" ", "\n", "\t", "\r\n", " \n")
        ),
        " " * 200 + "\n" * 70 + "\t" * 35 + " ",
        " ".join("1234567890" * count for count in (1, 2, 7)) + " -3.14e+10 1,000,000 ١٢٣",
    )
    yield from (f"a{token}b {token}{token}\n{token[:-1]}{token[1:]} {token}." for token in added)
    random = np.random.Philox(key=_SELF_TEST_SEED)
    kinds = (0x80, 0x250, 0x3000, 0xD800, 0x20000)  # so that each script is met at some size
    for number in range(200):
        raw = random.random_raw(48)
        top = kinds[number % len(kinds)]
        characters = (chr(int(value) % top) if int(value) >> 62 else " " for value in raw)
        yield "".join(character for character in characters if not "\ud800" <= character <= "\udfff")
