"""Ids and positions are those of `tokenizers`, whichever way a text goes."""

import unicodedata
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, processors

from miles.data.tokens import bpe
from miles.data.tokens.bpe import text_encoder
from miles.data.tokens.text_encoder import _NFC_SHRINKS, TextEncoder, Tokens, encode_by
from miles.data.types import RowRejected
from tests.support.byte_level import (
    ADDED,
    GPT_OSS,
    LLAMA3,
    QWEN,
    TEXTS,
    require_same,
    small,
    texts_,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small()


@pytest.fixture(scope="module", params=["fastokens", "tiktoken"])
def encoder(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> TextEncoder:
    encoder = text_encoder(tokenizer, request.param)
    assert encoder.kind == request.param
    return encoder


# The same ids and positions


@pytest.mark.parametrize(
    "pattern", [QWEN, LLAMA3, GPT_OSS, None, r"\p{L}+|\s+|'(?i:[sdmt]|ll|ve|re)"]
)
def test_ids_and_positions_are_those_of_tokenizers(pattern: str | None) -> None:
    tokenizer = small(pattern)
    encoder = text_encoder(tokenizer)
    assert encoder.kind != "tokenizers"
    for text in TEXTS:
        require_same(tokenizer, encoder, text)


@settings(max_examples=200, deadline=None)
@given(text=texts_, data=st.data())
def test_any_text(
    tokenizer: Tokenizer, encoder: TextEncoder, text: str, data: st.DataObject
) -> None:
    points = data.draw(
        st.lists(st.integers(0, len(text)), max_size=5).map(sorted)
    )  # repeated ones too
    require_same(tokenizer, encoder, text, points)


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(
        st.sampled_from(["", *ADDED]).flatmap(lambda token: texts_.map(token.__add__)), max_size=6
    )
)
def test_texts_together_are_as_each_by_itself(encoder: TextEncoder, texts: list[str]) -> None:
    texts = [*texts, "<think>\ud800"]  # half of a surrogate pair spoils no other
    points = [[*range(0, len(text) + 1, 2)] for text in texts]
    together = encoder.encode_all(texts, points)
    for text, places, tokens in zip(texts[:-1], points, together, strict=False):
        alone = encoder.encode_at(text, places)
        assert isinstance(tokens, Tokens)
        assert (tokens.ids.tolist(), *tokens[1:]) == (alone.ids.tolist(), *alone[1:])
    assert isinstance(together[-1], RowRejected)


def test_a_point_at_each_edge(encoder: TextEncoder) -> None:
    ids, first, straddled = encoder.encode_at("the<think>the", [0, 0, 1, 3, 10, 13, 13])
    assert len(ids) == 3
    assert first == [0, 0, 1, 1, 2, 3, 3]
    assert straddled == [False, False, True, False, False, False, False]


@pytest.mark.parametrize("text", ["\ud800", "ab\udfff", "\u6cd5\ud800", "<think>\udc00"])
@pytest.mark.parametrize("is_proven", [True, False])
def test_half_of_a_surrogate_pair(text: str, is_proven: bool) -> None:
    tokenizer = small()
    if not is_proven:
        tokenizer.normalizer = normalizers.NFKC()
    encoder = text_encoder(tokenizer)
    assert (encoder.kind != "tokenizers") == is_proven
    with pytest.raises(RowRejected, match="bad_message: text that is not Unicode"):
        encoder.encode(text)


def test_text_that_nfc_changes_keeps_its_positions(
    tokenizer: Tokenizer, encoder: TextEncoder
) -> None:
    text = "cafe\u0301 the<think>"
    ids, first, straddled = encoder.encode_at(text, [5, 9, 16])
    assert [tokenizer.id_to_token(token) for token in ids[first[0] : first[1]].tolist()] == [
        "\u0120the"
    ]  # " the"
    assert first[2] == len(ids)
    assert not any(straddled)


@pytest.mark.parametrize("text", [" " * 1_000_000, " " * 1_000_000 + "x"])
def test_a_million_blanks(tokenizer: Tokenizer, encoder: TextEncoder, text: str) -> None:
    """Too deep for tiktoken's regex engine."""
    require_same(tokenizer, encoder, text, [0, 5, len(text)])


@pytest.mark.parametrize("unit", ["a", "\u6cd5", "1", "\r\n", "ab", "!"])
def test_long_runs(tokenizer: Tokenizer, encoder: TextEncoder, unit: str) -> None:
    require_same(tokenizer, encoder, unit * 30_000, [0, 7, 30_000])


@pytest.mark.parametrize("engine", ["fastokens", "tiktoken"])
def test_text_on_which_tokenizers_panics(capfd: pytest.CaptureFixture[str], engine: str) -> None:
    encoder = text_encoder(small(), engine)
    with pytest.raises(RowRejected, match="bad_message: text that the tokenizer fails on"):
        encoder.encode(" " * 11_000_000 + "x")


def test_other_exceptions_pass() -> None:
    class Stopped:
        def encode(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_by(Stopped(), "a")  # type: ignore[arg-type]


def test_text_in_no_word_is_kept() -> None:
    """tiktoken drops what its pattern does not match; `tokenizers` keeps it as words of its own."""
    tokenizer = small(r"\p{L}+")
    encoder = text_encoder(tokenizer)
    assert encoder.kind != "tokenizers"
    for text in TEXTS:
        require_same(tokenizer, encoder, text)


def test_trimmed_offsets_include_their_blanks() -> None:
    tokenizer = small(None)
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True)])
    assert tokenizer.encode("the the").offsets[1] == (4, 7)
    for normalizer in (normalizers.NFC(), normalizers.NFKC()):
        tokenizer.normalizer = normalizer
        ids, first, straddled = text_encoder(tokenizer).encode_at("the the", [3, 4])
        assert len(ids) == 2
        assert (first, straddled) == ([1, 2], [False, True])


# How long a text is


def test_surely_longer(encoder: TextEncoder) -> None:
    longest = max(len("<|im_start|>"), encoder._max_token_bytes)
    assert encoder.is_surely_longer("a" * (10 * longest + 1), 10)
    assert not encoder.is_surely_longer("<|im_start|>" * 10, 10)
    assert encoder.is_surely_longer("\u6cd5" * (30 * longest + 1), 10)
    assert not encoder.is_surely_longer("\u1112\u1161\u11ab" * 10 * longest, 10)
    unproven = small()
    unproven.normalizer = normalizers.NFKC()
    assert not text_encoder(unproven).is_surely_longer("a" * 10_000, 1)


def test_nfc_shrinks_no_text_more_than_assumed() -> None:
    for character in map(chr, [*range(0xD800), *range(0xE000, 0x30000)]):
        composed = unicodedata.normalize("NFC", character)
        longest = max(
            len(unicodedata.normalize("NFD", character).encode()), len(character.encode())
        )
        assert longest <= _NFC_SHRINKS * len(composed.encode())


# The copy


def test_one_encoder_for_each_content(chatml_tokenizer: Any) -> None:
    first = small()
    encoder = text_encoder(first)
    assert text_encoder(small()) is encoder
    first.enable_truncation(3)
    first.enable_padding(length=9)
    assert text_encoder(first) is encoder
    first.add_tokens(["<new>"])
    other = text_encoder(first)
    assert other is not encoder
    assert len(other.encode("the <new> the the the the")) > 3
    chatml_tokenizer(
        "the", truncation=True, max_length=1, padding="max_length", split_special_tokens=True
    )
    ids = text_encoder(chatml_tokenizer.backend_tokenizer).encode("<|im_end|>the quick brown fox")
    assert (
        ids.tolist()
        == chatml_tokenizer("<|im_end|>the quick brown fox", add_special_tokens=False)["input_ids"]
    )


def test_the_copy_keeps_its_state() -> None:
    tokenizer = small()
    encoder = text_encoder(tokenizer)
    before = encoder.encode("cafe\u0301 <think> the").tolist()
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.encode_special_tokens = True
    tokenizer.enable_truncation(1)
    assert encoder.encode("cafe\u0301 <think> the").tolist() == before


def test_old_encoders_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "_encoders", {})
    monkeypatch.setattr(bpe, "_make", lambda own, *_: TextEncoder(own, "not tried"))
    for number in range(bpe._MAX_ENCODERS + 3):
        text_encoder(small(added=[f"<{number}>"]))
    assert len(bpe._encoders) == bpe._MAX_ENCODERS


# What is refused


def test_qwen3_is_converted(assets: Path) -> None:
    tokenizer = Tokenizer.from_file(str(assets / "qwen3-tokenizer" / "tokenizer.json"))
    encoder = text_encoder(tokenizer)
    assert encoder.kind != "tokenizers"
    for text in TEXTS:
        require_same(tokenizer, encoder, text)
    rows = pq.read_table(assets / "data" / "openhermes_sample.parquet").to_pylist()[::37]
    for row in rows:
        text = "".join(
            f"<|im_start|>{turn['from']}\n{turn['value']}<|im_end|>\n"
            for turn in row["conversations"]
        )
        require_same(tokenizer, encoder, text, range(0, len(text) + 1, 7))
    assert len(rows) > 400
