"""Whether tiktoken gives the ids of a Hugging Face tokenizer for every text: proven from its definition, or refused.

A byte-level BPE tokenizer of Hugging Face and tiktoken's differ in what decides a merge: there a list of pairs, here
the id of the result. They give the same ids for every text if (`prove`)

- the merges are in the order of the ids that they make, and merging the bytes of each token gives that token. Proof:
  look at the first step at which the two differ in a word. tiktoken could join A and B to a token V there, by a pair
  that is not listed. Until then both did the same, and what they did between V's ends is what merging V's bytes
  alone does: that comes to A B, and stays there. So it does not give V;
- or whole words are looked up first by both (`ignore_merges`). Then V's bytes may also end as three parts or more:
  they do not come to two;
- the text is cut into words by one regular expression of a few constructs that both regex engines read alike
  (`_PORTABLE`), and never matches nothing. Which characters its classes hold, a test asks for every code point,
  and `_require_same_characters` at load for those that a newer Unicode may have given a meaning;
- the normalizer is NFC or none. A text that NFC changes goes through `tokenizers`, row by row;
- added tokens are matched alike: no two can overlap in a text, none takes the blanks around it. One that is in the
  vocabulary too is left out of it: its bytes are in no word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import tiktoken
import tokenizers

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `tokenizers`' ByteLevel pre-tokenizer cuts by where it is asked to."""

_CHARACTERS = r"\\[pP]\{(?:L|Lu|Ll|Lt|Lm|Lo|M|N|P|S)\}|\\[sS]"
_ESCAPED = rf"{_CHARACTERS}|\\[rnt]|\\[-./|()\[\]{{}}*+?^$\\]"
_IN_CLASS = r"[^\\\[\]^&~|-]"
_CLASS = rf"\[\^?(?:{_ESCAPED}|{_IN_CLASS}(?:-{_IN_CLASS})?)+\]"
_ONCE = r"(?![*+?{])"
"""No quantifier follows, which the engines read in different ways behind another (`a{2}?`, `a{2}+`)."""
_ENDING = "'(?:s|t|re|ve|m|ll|d)"
_PORTABLE = re.compile(
    rf"(?:(?:{_ESCAPED}|{_CLASS}|[^\\^$.|?*+()\[\]{{}}])(?:(?:[?*+]|\{{\d+(?:,\d*)?\}}){_ONCE})?"
    rf"|\(\?i:{_ENDING}(?:\|{_ENDING})*\)(?:\?{_ONCE}|{_ONCE})|'\(\?i:\[sdmt\]\|ll\|ve\|re\){_ONCE}"
    rf"|\(\?:|\)(?:\?{_ONCE}|{_ONCE})|\||\(\?!\\S\){_ONCE})*"
)
"""Regular expressions that Oniguruma and Rust's fancy-regex read alike: both take the first alternative that matches,
and greedily. Not among them: `\\w` (² is one of Oniguruma's), `$` (any line's end there), `&&`, `[:alpha:]`, loops
over groups, case of anything but English endings."""

_MAX_ADDED_TOKENS = 2_000
_MAX_ADDED_CHARACTERS = 200
_MAX_ID = 1 << 22
"""More, and the table of tokens' lengths would be mostly gaps."""


class Inexact(Exception):
    """Why a tokenizer is not used through tiktoken."""


class Proven(NamedTuple):
    """What tiktoken is given."""

    pattern: str
    """cuts text into words"""
    ranks: dict[bytes, int]
    """tokens of the model -> ids"""
    added: dict[str, int]
    """added tokens -> ids"""


def prove(backend: tokenizers.Tokenizer, definition: Mapping[str, Any]) -> Proven:
    """Proves what this module's docstring says.

    Args:
        backend: the tokenizer.
        definition: the same as JSON, as `backend.to_str` gives it.

    Raises:
        Inexact: it does not hold.
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
    return Proven(_grouped(words), ranks, added)


def _word_pattern(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """The one regular expression that cuts text into words."""
    steps = [pre_tokenizer] if pre_tokenizer else []
    if pre_tokenizer and pre_tokenizer["type"] == "Sequence":
        steps = list(pre_tokenizer["pretokenizers"])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise Inexact("it is not byte-level, or puts a blank before text")
    if len(steps) == 1 and steps[0]["use_regex"]:
        return _GPT2_WORDS
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
    if re.match(
        re.sub(r"\\[pP]\{\w+\}", "a", pattern), ""
    ):  # where it ever matches nothing it does so here
        raise Inexact("its regular expression matches nothing, too")
    return pattern


def _grouped(pattern: str) -> str:
    """`a|b|c(?!d)|e` -> `(?:a|b)|c(?!d)|e`, which matches alike: what does not look ahead goes to the fast one of
    fancy-regex's engines as a whole."""
    alternatives, depth, is_class = [""], 0, False
    for piece in re.findall(r"\\.|.", pattern, re.DOTALL):
        is_class = (is_class or piece == "[") and piece != "]"
        depth += 0 if is_class else (piece == "(") - (piece == ")")
        if piece == "|" and depth == 0 and not is_class:
            alternatives.append("")
        else:
            alternatives[-1] += piece
    num_plain = next((n for n, one in enumerate(alternatives) if "(?!" in one), len(alternatives))
    if num_plain < 2:
        return pattern
    return "|".join([f"(?:{'|'.join(alternatives[:num_plain])})", *alternatives[num_plain:]])


def _require_same_characters(pattern: str) -> None:
    """Both engines know the same characters, of those that are newer than Python's Unicode."""
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
    """The model's tokens that can be in a word."""
    words = {token: rank for token, rank in vocabulary.items() if token not in added}
    if any(
        token in vocabulary and not all("!" <= character <= "~" for character in token)
        for token in added
    ):
        raise Inexact(
            "an added token shares its id with bytes of other text"
        )  # é: there the byte E9
    ids = {*words.values(), *added.values()}
    if len(ids) != len(words) + len(added):
        raise Inexact("two of its tokens have the same id")
    if max(ids, default=0) > _MAX_ID:
        raise Inexact(f"its ids go up to {max(ids)}")
    return words


def _byte_ranks(vocabulary: Mapping[str, int]) -> dict[bytes, int]:
    """Tokens as bytes -> ids. ByteLevel writes each byte as a printable character."""
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
    """What the listed merges make of a word is what merging by rank makes of it (proof: the module's docstring).

    Args:
        model: `tokenizers.models.BPE`; as it was, when this returns.
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
    """Whether a text can hold two of them, or one twice, so that they share characters."""
    begins = {token[:length] for token in tokens for length in range(1, len(token))}
    if any(token[-length:] in begins for token in tokens for length in range(1, len(token))):
        return True
    joined = "\0".join(tokens)
    return any(joined.count(token) > 1 for token in tokens)
