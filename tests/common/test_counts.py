"""A number and its noun, as a person writes them."""

from __future__ import annotations

import pytest

from miles.common.counts import counted


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0 batches"),
        (1, "1 batch"),
        (2_000, "2,000 batches"),
        (1.0, "1 batch"),
        (0.5, "0.5 batches"),
    ],
)
def test_a_number_has_its_noun(number: float, words: str) -> None:
    assert counted(number, "batch", "batches") == words


def test_most_nouns_take_an_s() -> None:
    assert counted(3, "row") == "3 rows"
