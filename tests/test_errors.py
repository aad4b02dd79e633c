"""The text of an error is short, whatever stands in it."""

from __future__ import annotations

import pickle

from miles.common.shown import cut, shown
from miles.errors import ConfigError, MissingFileError, brief


def test_a_text_of_a_usual_length_stays() -> None:
    path = "/".join(["folder"] * 50)
    text = f"{path}: no such file. Name another one"
    assert brief(text) == text == str(MissingFileError(text))


def test_a_long_word_keeps_its_ends() -> None:
    path = f"/first/{'x' * 100_000}/last.jsonl"
    text = str(ConfigError(f"--save {path}: no such folder"))
    assert text.startswith("--save /first/xxx")
    assert text.endswith("xxx/last.jsonl: no such folder")
    assert "(99,620 characters left out)" in text
    assert len(text) < 500


def test_a_long_text_keeps_its_remedy() -> None:
    text = str(ConfigError(f"found {'a b ' * 100_000}; leave it out"))
    assert text.startswith("found a b a b")
    assert text.endswith("a b ; leave it out")
    assert len(text) < 6_100


def test_an_error_of_a_rank_is_whole_where_it_arrives() -> None:
    error = ConfigError("x" * 1_000)
    assert pickle.loads(pickle.dumps(error)).args == error.args


def test_a_quoted_value_fits_a_sentence() -> None:
    assert shown("x") == "'x'"
    assert cut("x" * 80) == "x" * 80
    assert cut("x" * 81) == "x" * 80 + "…"
    assert shown(list(range(1_000_000))).startswith("[0, 1, 2")
    assert len(shown("y" * 100_000)) == 81
    assert shown(10**5_000) == "a number of thousands of digits"
