"""Tells whether the ids of a tokenizer keep a text: whether they decode to it again.

    "if x:\\n    y"  ->  ids  ->  "if x:\\n    y"     it does
    "if x:\\n    y"  ->  ids  ->  "if x : y"        blanks are lost: no model can learn them

Two differences are no loss. A tokenizer that declares NFC composes characters: "e" and an accent
become "é", which is the same text. And one may put a blank before a text (SentencePiece's dummy
prefix), or take one off; so no probe begins with a blank, and one before the decoded text goes.
How transformers tidies decoded text (`clean_up_tokenization_spaces`) loses nothing, and is off.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from typing import Any

import tokenizers

from miles.data.tokens.text_encoder import encode_by
from miles.data.types import RowRejected

PROBES = (
    "x",
    "one two  three   four",
    "the end.  ",
    "a\nb\n\nc\n\n\nd\n",
    "def f(x):\n    if x:\n\t\treturn {'a': [1, 2]}  # it's\n",
    "a\tb\r\nc",
    "Capital LETTERS, naïve Überraschung: 3.14 + 10,000 = ½?",
    "It 's a test . Do n't tidy it , please !",
    "法国的首都是哪里？巴黎，（对）。 日本語のテキスト 한국어",
    "emoji 👩‍👩‍👧 and 🇩🇪 ☕️",
    "composed é and e\u0301, á and a\u0301",
)
"""Texts that a tokenizer for chat must keep. None begins with a blank."""

_NUM_SHOWN = 40


@dataclass(frozen=True)
class Loss:
    """A text that a tokenizer's ids do not keep."""

    what: str
    """is lost, for an error"""
    text: str
    decoded: str

    def __str__(self) -> str:
        at = _first_difference(self.text, self.decoded)
        begin = max(at - _NUM_SHOWN // 2, 0)
        shown = self.text[begin : begin + _NUM_SHOWN]
        decoded = self.decoded[begin : begin + _NUM_SHOWN]
        return f"{self.what}: the ids of {shown!r} decode to {decoded!r}"


def composes(backend: tokenizers.Tokenizer) -> bool:
    """Return whether a tokenizer declares that it brings text into NFC."""
    if backend.normalizer is None:
        return False
    return "NFC" in _types_of(json.loads(backend.normalizer.__getstate__()))


def find_loss(backend: tokenizers.Tokenizer) -> Loss | None:
    """Return the first of the probes that the tokenizer's ids do not keep; None: they keep all."""
    is_composed = composes(backend)
    for text in PROBES:
        try:
            ids = encode_by(backend, text).ids
        except RowRejected:
            return Loss("text", text, "")
        decoded = backend.decode(ids, skip_special_tokens=False).lstrip(" ")
        meant = unicodedata.normalize("NFC", text) if is_composed else text
        if decoded != meant:
            return Loss(_what_is_lost(meant, decoded), meant, decoded)
    return None


def _what_is_lost(text: str, decoded: str) -> str:
    if "".join(text.split()) == "".join(decoded.split()):
        return "blanks and newlines are lost"
    if text.lower() == decoded.lower():
        return "capital letters are lost"
    return "characters are lost"


def _first_difference(text: str, other: str) -> int:
    pairs = enumerate(zip(text, other, strict=False))
    return next((at for at, (own, changed) in pairs if own != changed), min(len(text), len(other)))


def _types_of(normalizer: Any) -> set[str]:
    """Return the types of a normalizer and of those within it."""
    if not isinstance(normalizer, dict):
        return set()
    types = {str(normalizer.get("type"))}
    for part in normalizer.get("normalizers", ()):
        types |= _types_of(part)
    return types
