"""A proof that tiktoken gives the ids of a Hugging Face tokenizer for every text, or a refusal.

A byte-level BPE tokenizer of Hugging Face and tiktoken's differ in what decides a merge: there a
list of pairs, here the id of the result. They give the same ids for every text if (`prove`)

- the merges are in the order of the ids that they make, and merging the bytes of each token gives
  that token. Proof: look at the first step at which the two differ in a word. tiktoken could join A
  and B to a token V there, by a pair that is not listed. Until then both did the same, and between
  V's ends they did what merging V's bytes alone does: that comes to A B, and stays there. So
  merging V's bytes does not give V;
- or whole words are looked up first by both (`ignore_merges`). Then V's bytes may also end as three
  parts or more: they do not come to two;
- the text is cut into words by one regular expression of a few constructs that both regex engines
  read alike (`_PORTABLE`), and it never matches the empty string. A test compares the characters of
  its classes for every code point; `_require_same_characters` does so at load for the characters
  that a newer Unicode may have given a meaning;
- the normalizer is NFC or none. A text that NFC changes goes through `tokenizers`, row by row;
- added tokens are matched alike: no two can overlap in a text, and none takes the blanks around it.
  One that is in the vocabulary too is left out of it: its bytes are in no word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import tiktoken
import tokenizers

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The expression by which the ByteLevel pre-tokenizer of `tokenizers` cuts, if it is asked to."""

_CHARACTERS = r"\\[pP]\{(?:L|Lu|Ll|Lt|Lm|Lo|M|N|P|S)\}|\\[sS]"
_ESCAPED = rf"{_CHARACTERS}|\\[rnt]|\\[-./|()\[\]{{}}*+?^$\\]"
_IN_CLASS = r"[^\\\[\]^&~|-]"
_CLASS = rf"\[\^?(?:{_ESCAPED}|{_IN_CLASS}(?:-{_IN_CLASS})?)+\]"
_ONCE = r"(?![*+?{])"
"""No quantifier follows, which the engines read in different ways behind another (`a{2}?`,
`a{2}+`)."""
_ENDING = "'(?:s|t|re|ve|m|ll|d)"
_PORTABLE = re.compile(
    rf"(?:(?:{_ESCAPED}|{_CLASS}|[^\\^$.|?*+()\[\]{{}}])(?:(?:[?*+]|\{{\d+(?:,\d*)?\}}){_ONCE})?"
    rf"|\(\?i:{_ENDING}(?:\|{_ENDING})*\)(?:\?{_ONCE}|{_ONCE})|'\(\?i:\[sdmt\]\|ll\|ve\|re\){_ONCE}"
    rf"|\(\?:|\)(?:\?{_ONCE}|{_ONCE})|\||\(\?!\\S\){_ONCE})*"
)
"""Regular expressions that Oniguruma and Rust's fancy-regex read alike: both take the first
alternative that matches, and greedily. Not among them: `\\w` (² is one of Oniguruma's), `$` (any
line's end there), `&&`, `[:alpha:]`, loops over groups, case of anything but English endings."""

_MAX_ADDED_TOKENS = 2_000
_MAX_ADDED_CHARACTERS = 200
_MAX_ID = 1 << 22
"""More, and the table of tokens' lengths would be mostly gaps."""


class Inexact(Exception):
    """The reason why a tokenizer is not used through tiktoken."""


class Proven(NamedTuple):
    """A tokenizer as tiktoken takes it."""

    pattern: str
    """cuts text into words, as the tokenizer has it"""
    ranks: dict[bytes, int]
    """tokens of the model -> ids"""
    added: dict[str, int]
    """added tokens -> ids"""


def prove(backend: tokenizers.Tokenizer, definition: Mapping[str, Any]) -> Proven:
    """Prove that tiktoken gives the same ids, by the conditions in this module's docstring.

    Args:
        backend: the tokenizer.
        definition: the same as JSON, as `backend.to_str` gives it.

    Raises:
        Inexact: a condition does not hold.
    """
    model = definition["model"]
    if model.get("type") != "BPE":
        raise Inexact(f"its model is {model.get('type')}, not byte-level BPE")
    for option in (
        "dropout",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
    ):
        if model.get(option):
            raise Inexact(f"its model has {option}")

    normalizer = definition["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise Inexact(f"its normalizer is {normalizer['type']}")
    words = _word_pattern(definition["pre_tokenizer"])
    added = _added_tokens(definition["added_tokens"])
    if normalizer is not None and any(
        backend.normalizer.normalize_str(token) != token for token in added
    ):
        raise Inexact("an added token is not in NFC")

    vocabulary = _without_added(model["vocab"], added)
    ranks = _byte_ranks(vocabulary)
    _require_same_merges(backend.model, vocabulary, model["merges"])
    _require_same_characters(words)
    return Proven(words, ranks, added)


def _word_pattern(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """Return the one regular expression that cuts text into words."""
    steps = [pre_tokenizer] if pre_tokenizer else []
    if pre_tokenizer and pre_tokenizer["type"] == "Sequence":
        steps = list(pre_tokenizer["pretokenizers"])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise Inexact("it is not byte-level, or puts a blank before text")
    if len(steps) == 1 and steps[0]["use_regex"]:
        return GPT2_WORDS
    if len(steps) == 2 and steps[0]["type"] == "Split" and not steps[1]["use_regex"]:
        split = steps[0]
        if split["behavior"] == "Isolated" and not split["invert"] and "Regex" in split["pattern"]:
            return _require_portable(str(split["pattern"]["Regex"]))
    raise Inexact("it does not cut text into words by one regular expression")


def _require_portable(pattern: str) -> str:
    if not _PORTABLE.fullmatch(pattern):
        raise Inexact(
            "its regular expression has constructs that regex engines read in different ways"
        )
    # A pattern that ever matches the empty string does so here.
    if re.match(re.sub(r"\\[pP]\{\w+\}", "a", pattern), ""):
        raise Inexact("its regular expression matches nothing, too")
    return pattern


def grouped(pattern: str) -> str:
    """Group the alternatives before the first that looks ahead: `a|b|c(?!d)` -> `(?:a|b)|c(?!d)`.

    It matches alike, and the group as a whole goes to the fast one of fancy-regex's engines.
    """
    alternatives = [""]
    depth = 0
    is_class = False
    for piece in re.findall(r"\\.|.", pattern, re.DOTALL):
        is_class = (is_class or piece == "[") and piece != "]"
        depth += 0 if is_class else (piece == "(") - (piece == ")")
        if piece == "|" and depth == 0 and not is_class:
            alternatives.append("")
        else:
            alternatives[-1] += piece

    looks_ahead = ["(?!" in alternative for alternative in alternatives]
    num_plain = looks_ahead.index(True) if True in looks_ahead else len(alternatives)
    if num_plain < 2:
        return pattern
    return "|".join([f"(?:{'|'.join(alternatives[:num_plain])})", *alternatives[num_plain:]])


def _require_same_characters(pattern: str) -> None:
    """Require that both engines class the characters alike that are newer than Python's Unicode."""
    unknown = "".join(c for c in map(chr, range(0x80, 0x40000)) if unicodedata.category(c) == "Cn")
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    for characters in sorted(set(re.findall(_CHARACTERS, pattern))):
        # tiktoken drops what its pattern does not match
        core = tiktoken.Encoding(
            "characters", pat_str=f"{characters}+", mergeable_ranks=single_bytes, special_tokens={}
        )
        split = tokenizers.pre_tokenizers.Split(
            tokenizers.Regex(f"{characters}+"), "removed", invert=True
        )

        theirs = "".join(part for part, _ in split.pre_tokenize_str(unknown))
        if bytes(core.encode_ordinary(unknown)) != theirs.encode():
            raise Inexact("tokenizers and tiktoken know different versions of Unicode")


def _without_added(vocabulary: Mapping[str, int], added: Mapping[str, int]) -> dict[str, int]:
    """Return the model's tokens that can be in a word."""
    words = {token: rank for token, rank in vocabulary.items() if token not in added}
    for token in added:
        is_ascii = all("!" <= character <= "~" for character in token)
        if token in vocabulary and not is_ascii:  # é: in the vocabulary, the byte E9
            raise Inexact("an added token shares its id with bytes of other text")

    ids = {*words.values(), *added.values()}
    if len(ids) != len(words) + len(added):
        raise Inexact("two of its tokens have the same id")
    if max(ids, default=0) > _MAX_ID:
        raise Inexact(f"its ids go up to {max(ids)}")
    return words


def _byte_ranks(vocabulary: Mapping[str, int]) -> dict[bytes, int]:
    """Return tokens as bytes -> ids. ByteLevel writes each byte as a printable character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {byte: byte for byte in printable} | {256 + n: byte for n, byte in enumerate(others)}
    if not {*map(ord, set("".join(vocabulary)))} <= byte_of.keys() or "" in vocabulary:
        raise Inexact("a token of its vocabulary is not made of bytes")
    ranks = {token.translate(byte_of).encode("latin-1"): rank for token, rank in vocabulary.items()}
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise Inexact("its vocabulary lacks some bytes")
    return ranks


def _require_same_merges(model: Any, vocabulary: Mapping[str, int], merges: Sequence[Any]) -> None:
    """Require that the listed merges and merging by rank give the same tokens for every word.

    The module's docstring has the proof.

    Args:
        model: `tokenizers.models.BPE`; unchanged when this returns.
        vocabulary: its tokens that can be in a word, as ByteLevel writes them -> ids.
        merges: its pairs, the first to be merged first.
    """
    results = [
        "".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in merges
    ]
    ids = [vocabulary[result] for result in results if result in vocabulary]
    if any(earlier > later for earlier, later in pairwise(ids)):
        raise Inexact("its merges are not in the order of their results' ids")

    looks_up_words = model.ignore_merges
    model.ignore_merges = False
    try:
        for token in vocabulary:
            num_parts = len(model.tokenize(token))
            if num_parts == 2 or (num_parts > 2 and not looks_up_words):
                raise Inexact("its merges do not make every token of its vocabulary")
    finally:
        model.ignore_merges = looks_up_words


def _added_tokens(added: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    tokens = {token["content"]: int(token["id"]) for token in added}
    for token in added:
        if token["single_word"] or token["lstrip"] or token["rstrip"]:
            raise Inexact("an added token takes the blanks around it, or only whole words")
    if len(tokens) > _MAX_ADDED_TOKENS:
        raise Inexact(f"it has {len(tokens)} added tokens")
    if not all(0 < len(token) <= _MAX_ADDED_CHARACTERS for token in tokens):
        raise Inexact("an added token is empty, or very long")
    if _can_overlap(tokens):
        raise Inexact("two added tokens can overlap in a text")
    return tokens


def _can_overlap(tokens: Collection[str]) -> bool:
    """Return whether a text can hold two of them, or one twice, so that they share characters."""
    beginnings = set()
    endings = set()
    for token in tokens:
        for length in range(1, len(token)):
            beginnings.add(token[:length])
            endings.add(token[-length:])
    if beginnings & endings:
        return True

    joined = "\0".join(tokens)
    return any(joined.count(token) > 1 for token in tokens)
