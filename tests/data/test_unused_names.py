"""Names of what nothing reads stay few and short, whatever a row calls its keys."""

from __future__ import annotations

from miles.data.unused_names import (
    MAX_CHARACTERS,
    MAX_NAMES,
    OTHERS,
    add_count,
    count_row,
    few_names,
    short_name,
)


def test_a_long_name_is_cut() -> None:
    assert short_name("thought") == "thought"
    assert short_name("x" * 40) == "x" * 40
    assert short_name("x" * 41) == "x" * 39 + "…"
    assert len(short_name("ü" * 1_000)) == MAX_CHARACTERS


def test_half_a_character_becomes_text() -> None:
    assert short_name("a\ud800") == "a?"


def test_a_name_stays_in_one_line() -> None:
    assert short_name("a\nb") == "a↵b"


def test_a_row_counts_once_for_each_name() -> None:
    counts: dict[str, int] = {}
    count_row(counts, ("a", "x" * 50 + "1", "x" * 50 + "2"))
    count_row(counts, ("a",))
    assert counts == {"a": 2, "x" * 39 + "…": 1}


def test_a_row_of_many_names_counts_once_among_the_others() -> None:
    counts: dict[str, int] = {}
    count_row(counts, [str(number) for number in range(10_000)])
    count_row(counts, ["1", "new", "newer"])
    assert len(counts) == MAX_NAMES + 1
    assert (counts["0"], counts["1"], counts[OTHERS]) == (1, 2, 2)


def test_a_count_of_a_name_too_many_goes_to_the_others() -> None:
    counts = {str(number): 1 for number in range(MAX_NAMES)}
    add_count(counts, "5", 3)
    add_count(counts, "new", 3)
    add_count(counts, OTHERS, 4)
    assert (counts["5"], counts[OTHERS], len(counts)) == (4, 7, MAX_NAMES + 1)


def test_columns_are_bounded_alike() -> None:
    assert few_names(["a", "b", "a"]) == ("a", "b")
    names = few_names(str(number) for number in range(MAX_NAMES + 5))
    assert (len(names), names[-1]) == (MAX_NAMES + 1, OTHERS)
