"""What was dropped and not used, in words: short, by source, and nothing where there is nothing."""

from __future__ import annotations

from typing import Any

import pytest

from miles.data.config import RowFormat
from miles.data.files.left_out import LeftOut
from miles.data.files.manifest import ManifestSource
from miles.data.reasons import REASONS
from miles.data.stream import account
from miles.data.types import REJECT_REASONS
from miles.data.unused_names import MAX_NAMES, OTHERS

SPLIT = LeftOut.of("of split test", [f"test-{number}.jsonl" for number in range(12)], True)
CSV = LeftOut.of("in another format", ["a.csv"], True)
README = LeftOut.of("without rows", ["README.md"], False)


def source(*columns: str, left_out: tuple[LeftOut, ...] = ()) -> ManifestSource:
    return ManifestSource("chat", RowFormat("text"), {}, (), left_out, columns)


def test_a_source_that_is_used_as_a_whole_says_nothing() -> None:
    entry = account.not_used(source(left_out=(README,)), {})
    assert account.lines({"chat": entry}) == []
    assert account.sentences({"chat": {**entry, "counts": {"read": 3, "trained": 3}}}) == []
    assert entry["left_out"] == [README.to_json()], "the ledger has it all"


def test_a_ledger_of_an_older_version_says_nothing_of_it() -> None:
    assert account.lines({"chat": {"counts": {"read": 3}, "row_shape": "text"}}) == []


def test_each_line_is_short() -> None:
    keys = {f"{'k' * 36}{number:03}…": 1_000 + number for number in range(MAX_NAMES)}
    entry = account.not_used(
        source(*(f"{'c' * 36}{number:03}…" for number in range(MAX_NAMES)), left_out=(SPLIT, CSV)),
        keys | {OTHERS: 9_999_999},
    )
    lines = account.lines({"chat": entry})
    assert [label for label, _ in lines] == ["keys not used", "columns not used", "files left out"]
    assert all(len(text) < 500 for _, text in lines)
    assert lines[0][1].startswith(f"{'k' * 36}099… (1,099 rows), {'k' * 36}098…")
    assert lines[0][1].endswith(" and 95 more")
    assert lines[2][1] == (
        "12 of split test (test-0.jsonl, test-1.jsonl, …); 1 in another format (a.csv)"
    )


def test_several_sources_are_named() -> None:
    one = account.not_used(source("id"), {"mood": 1})
    none = account.not_used(source(), {})
    assert account.lines({"chat": one, "code": none}) == [
        ("keys not used", "chat: mood (1 row)"),
        ("columns not used", "chat: id"),
    ]
    assert account.lines({"chat": one}) == [
        ("keys not used", "mood (1 row)"),
        ("columns not used", "id"),
    ]
    assert account.of_keys({"chat": {"mood": 2}, "code": {}}) == [
        ("keys not used", "chat: mood (2 rows)")
    ]


def test_the_most_frequent_reasons_come_with_a_remedy() -> None:
    counts = {"read": 50, "trained": 1, "too_long": 5, "bad_message": 7, "unknown_role": 30}
    counts |= {"no_messages": 7}
    assert account.dropped(counts) == [
        ("dropped", "30 unknown_role, 7 no_messages, 7 bad_message, 5 too_long"),
        *(
            ("", f"{reason}: {REASONS[reason].remedy}")
            for reason in ("unknown_role", "no_messages", "bad_message")
        ),
    ]
    ledger = {"chat": {"counts": counts, **account.not_used(source("id"), {})}}
    assert account.sentences(ledger)[0].startswith("dropped: 30 unknown_role, ")
    assert account.sentences(ledger)[-1] == "columns not used: id"
    assert account.dropped({"read": 3, "trained": 2, "held_out": 1}) == []


def test_advice_is_on_the_most_frequent_reason() -> None:
    remedy = f"What to do: {REASONS['bad_tool_call'].remedy}."
    assert account.advice({"read": 9, "trained": 9}) == ""
    one = {"read": 9, "trained": 1, "bad_tool_call": 8}
    assert account.advice(one) == f" {remedy}"
    assert account.advice(one, "row 3") == f" All: bad_tool_call (first: row 3). {remedy}"
    several = {"too_long": 1, **one}
    assert account.advice(several) == f" Most often: bad_tool_call. {remedy}"
    assert account.advice(several, "row 3") == (
        f" Most often: bad_tool_call (first: row 3). {remedy}"
    )


@pytest.mark.parametrize("reason", REJECT_REASONS)
def test_every_reason_says_what_to_do_in_a_short_sentence(reason: str) -> None:
    words: Any = REASONS[reason]
    assert 10 < len(words.remedy) < 100
    assert not words.remedy.endswith(".")
    assert 10 < len(words.meaning) < 100
