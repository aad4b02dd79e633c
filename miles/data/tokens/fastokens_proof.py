"""A proof that fastokens gives tiktoken's ids for a tokenizer, or a refusal.

tiktoken's are proven to be the tokenizer's (`bpe_proof.py`). fastokens does three things its own
way, and each is tried against tiktoken:

words     by scanners that are written by hand, for a few regular expressions alone (`_TRIED`). A
          tiny vocabulary that joins any two of its neighbours shows where they cut: at every
          sequence of four kinds of characters, at every edge between Unicode's categories, and at
          every character that is newer than Python's Unicode. Tests do it for all code points
merges    from the ranks that were proven. Every token of the vocabulary is encoded as a word
memory    words that it has seen are kept, in a table that is cleared when it is full, by thread.
          The words go through it twice, so that what it kept is compared, too

Its normalizer is not used: it gets only text that is normal, as tiktoken does. Nor are its
post-processor and its segment cache.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise, product

import numpy as np

from miles.data.tokens.bpe_proof import Inexact
from miles.data.tokens.engines import FASTOKENS, LONG_S, FastokensCore, engine_from

_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN = (
    rf"{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTED}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTED}?",
        rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    ]
)
_TRIED = (_QWEN, _QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|"), _O200K)
"""The expressions of Qwen2 and 3, Llama 3 and GPT-OSS: fastokens 0.3.5 has cut by each as tiktoken
does, for all code points but ſ. Others it gives to PCRE2, of another Unicode: U+180E is a blank
there."""

_KINDS = "asA1 \n\r\t'!/\u00e9\u6cd5\u0301"
"""One character of each kind that a scanner tells apart, and those of which pairs are tokens."""
_SEQUENCE = 4
_RUN = 5_000
_NEWEST = 0x40000
"""Code points above are of no use to anyone yet."""


def require_proven(core: FastokensCore) -> None:
    """Require that fastokens gives tiktoken's ids.

    Args:
        core: of a tokenizer that is proven to be tiktoken's.

    Raises:
        Inexact: it does not, or it cannot be shown.
    """
    if core.pattern not in _TRIED:
        raise Inexact("fastokens was never tried with its regular expression")
    probing = engine_from(core.pattern, _probing_ranks(), {"\0\0": _NEWEST}, FASTOKENS)
    assert isinstance(probing, FastokensCore)
    for text in (_sequences(_KINDS, _SEQUENCE), characters_in_context(_doubtful())):
        if not _is_same(probing, text):
            raise Inexact("fastokens cuts text into other words")

    words = "\n".join([token.decode(errors="ignore") for token in core.ranks])
    runs = "<".join(unit * _RUN for unit in ("a", "ab", "1", " ", "\r\n", "!", "\u6cd5"))
    for text in (words, runs):
        if not _is_same(core, text):
            raise Inexact("fastokens merges the bytes of a word in another way")


def _is_same(core: FastokensCore, text: str) -> bool:
    """Return whether both give the same ids, fastokens also from its memory of words."""
    expected = core.slow.ids(text)
    for _ in range(2):
        ids = core.fast_ids(text)
        if ids is None or expected is None or not np.array_equal(ids, expected):
            return False
    return True


@cache
def _probing_ranks() -> dict[bytes, int]:
    """Return a vocabulary in which a missing cut between two characters makes another token."""
    plain = [character.encode() for character in _KINDS if character.isascii()]
    leading = [bytes([byte]) for byte in range(0xC2, 0xF5)]
    continuing = [bytes([byte]) for byte in range(0x80, 0xC0)]
    pairs = [*product(plain, plain), *product(continuing, plain), *product(plain, leading)]
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [left + right for left, right in pairs]
    return {token: rank for rank, token in enumerate(tokens)}


def characters_in_context(characters: Sequence[str]) -> str:
    """Return a text with each character beside letters, digits, blanks and marks."""
    return "".join(f"a{c}a1{c}1 {c}!{c}\n{c}'{c}s" for c in characters)


@cache
def _doubtful() -> Sequence[str]:
    """Return characters that Python does not know, and those beside which the category changes."""
    known = [chr(point) for point in range(0x80, _NEWEST) if not 0xD800 <= point < 0xE000]
    categories = [unicodedata.category(character) for character in known]
    doubtful = {c for c, category in zip(known, categories, strict=True) if category == "Cn"}
    for (left, right), (before, after) in zip(pairwise(known), pairwise(categories), strict=True):
        if before != after:
            doubtful |= {left, right}
    return sorted(doubtful - {LONG_S})


def _sequences(kinds: str, length: int) -> str:
    """Return a text that holds every sequence of that many kinds: a de Bruijn sequence."""
    numbers = [*_de_bruijn(len(kinds), length)]
    return "".join(kinds[number] for number in [*numbers, *numbers[: length - 1]])


def _de_bruijn(num_symbols: int, length: int) -> Iterator[int]:
    """Yield the Lyndon words whose lengths divide `length`, in order, end to end."""
    word = [-1]
    while word:
        word[-1] += 1
        if length % len(word) == 0:
            yield from word
        size = len(word)
        while len(word) < length:
            word.append(word[-size])
        while word and word[-1] == num_symbols - 1:
            word.pop()
