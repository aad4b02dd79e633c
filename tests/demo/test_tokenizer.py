"""The demo's tokenizer: special tokens, pieces, round trips."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from miles.demo import rows
from miles.demo.tokenizer import ADDED_TOKENS, build_tokenizer
from miles.errors import ConfigError


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path):
    return AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)


def pieces(tokenizer, text: str) -> list[str]:
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in split]


def test_every_row_comes_back(tokenizer):
    for text in rows.texts():
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == unicodedata.normalize(
            "NFC", text
        )


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n \t\r\n",
        "\x00\x7f",
        "🏳️‍🌈 𝕏",
        "a\u0301",
        "ไทย",
        "don't  stop",
        "foo_bar(x)[0] != 1",
    ],
)
def test_decoding_gives_normal_form_c(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == unicodedata.normalize(
        "NFC", text
    )


def test_size_and_special_tokens(tokenizer):
    assert len(tokenizer) == 2048
    assert tokenizer.convert_tokens_to_ids(list(ADDED_TOKENS)) == list(
        range(2048 - len(ADDED_TOKENS), 2048)
    )
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.bos_token is None

    ids = tokenizer.encode("<|im_start|>assistant\n<think>\n\n</think>\n\nYes<|im_end|>\n")
    assert (
        tokenizer.decode(ids, skip_special_tokens=True) == "assistant\n<think>\n\n</think>\n\nYes\n"
    )
    for text in ADDED_TOKENS:
        assert len(tokenizer.encode(text)) == 1


def test_the_template_headers_are_one_token_each(tokenizer):
    for role in ("system", "user", "assistant"):
        assert len(tokenizer.encode(role)) == 1


def test_pieces_that_are_never_merged(tokenizer):
    assert "|".join(pieces(tokenizer, "Let's go in 2024, num_rows!\n\n  x")) == (
        "Let|'s| go| in| |2|0|2|4|,| num|_rows|!\n\n| | x"
    )
    # vowel signs stay with their letters
    assert pieces(tokenizer, "नमस्ते दुनिया") == ["नमस्ते", " दुनिया"]


def test_same_texts_same_files(tokenizer_folder, tmp_path):
    build_tokenizer(rows.texts(), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (tokenizer_folder / name).read_bytes()


def test_other_sizes(tmp_path):
    build_tokenizer(rows.texts(), tmp_path, vocab_size=600)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 600
    build_tokenizer(["short"], tmp_path, vocab_size=4096)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) < 600


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="265"):
        build_tokenizer(["text"], tmp_path, vocab_size=264)


def test_a_model_beside_keeps_the_split(tokenizer, model_folder):
    # transformers 5 picks a tokenizer's class from config.json too, and Qwen's own class has its
    # own split.
    beside = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    assert json.loads((model_folder / "config.json").read_text())["model_type"] == "qwen3"
    for text in rows.texts():
        assert beside.encode(text) == tokenizer.encode(text)
    messages = [{"role": "user", "content": "Hi"}]
    assert beside.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )


def test_rows_are_short_in_tokens(tokenizer):
    lengths = [len(tokenizer.encode(line)) for line in rows.texts()]
    num_rows = sum(len(rows.lines(name)) for name in rows.FILES) - len(rows.BROKEN)
    assert sum(lengths) / num_rows <= 90  # the template adds some 15 tokens to a row
