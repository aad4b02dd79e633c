"""A text of inert characters is in NFC."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from miles.data.tokens.nfc import _table, is_inert

INERT = [chr(number) for number in np.flatnonzero(_table()).tolist()]


def seconds_of_pairs() -> set[str]:
    """Return the characters that can be the second part of a composition."""
    seconds = set(map(chr, (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))))  # parts of Hangul
    for number in range(0x110000):
        pair = unicodedata.decomposition(chr(number)).split()
        if len(pair) == 2 and not pair[0].startswith("<"):
            seconds.add(chr(int(pair[1], 16)))
    return seconds


def test_inert_characters_are_inert() -> None:
    assert not [text for text in INERT if unicodedata.category(text) in ("Cn", "Cs")]
    assert not [text for text in INERT if unicodedata.combining(text)]
    assert not [text for text in INERT if not unicodedata.is_normalized("NFC", text)]
    assert seconds_of_pairs().isdisjoint(INERT)


def test_tokenizers_leaves_inert_characters() -> None:
    text = "".join(INERT)
    assert is_inert([text])
    assert normalizers.NFC().normalize_str(text) == text


@given(text=st.lists(st.sampled_from(INERT) | st.characters()).map("".join))
def test_inert_texts_are_normal(text: str) -> None:
    if is_inert([text]):
        assert normalizers.NFC().normalize_str(text) == text


@pytest.mark.parametrize(
    "text",
    ["naïve", "你好，", "привет", "한국어", "日本語テキスト", "👩‍👩‍👧 😀", "שלום", "“x” – y"],
)
def test_usual_text_is_inert(text: str) -> None:
    assert is_inert([text, "a"])


@pytest.mark.parametrize("text", ["e\u0301", "\u1112\u1161", "\u212b", "\ud800", "\u0915\u094d"])
def test_other_text_is_not(text: str) -> None:
    assert not is_inert(["a", text])
