"""Streamed text is broken between words, however its pieces are cut."""

from __future__ import annotations

import random

import pytest

from miles.chat.wrapping import Wrapper

TEXT = "The quick brown fox\n\n    jumps over 法法法法 a-very-long-word-indeed  the dog.\n"
WRAPPED = "The quick\nbrown fox\n\n    jumps\nover\n法法法法 a\n"


def shown(pieces: list[str], num_columns: int | None) -> str:
    wrapper = Wrapper(num_columns)
    return "".join(map(wrapper.add, pieces)) + wrapper.end()


def test_words_go_to_the_next_line() -> None:
    assert shown(["The quick brown fox\n\n    jumps over 法法法法 a\n"], 10) == WRAPPED


def test_pieces_change_nothing(draw: random.Random) -> None:
    words = TEXT.replace("a-very-long-word-indeed", "word")
    for _ in range(50):
        cuts = sorted(draw.randrange(len(words)) for _ in range(8))
        pieces = [words[a:b] for a, b in zip([0, *cuts], [*cuts, len(words)], strict=True)]
        assert shown(pieces, 12) == shown([words], 12)


@pytest.mark.parametrize("num_columns", [20, 40, 80])
def test_no_line_is_longer_than_the_screen(num_columns: int) -> None:
    lines = shown([TEXT * 5], num_columns).split("\n")
    assert max(len(line) for line in lines if "indeed" not in line) <= num_columns
    assert "".join(shown([TEXT * 5], num_columns).split()) == "".join((TEXT * 5).split())


def test_a_pipe_gets_the_text_as_it_is() -> None:
    assert shown([TEXT[:9], TEXT[9:]], None) == TEXT


def test_a_word_appears_when_it_is_whole() -> None:
    wrapper = Wrapper(20)
    assert wrapper.add("hel") == ""
    assert wrapper.add("lo wor") == "hello"
    assert wrapper.end() == " wor"
