"""What the user's function makes of a row, and each way in which it fails."""

from __future__ import annotations

import json
from typing import Any

import pytest

from miles.data.files.made_rows import transformed
from miles.data.transforms import Function, Transform
from miles.data.types import UNREADABLE_ROW, RowRejected

ROW = {"q": "2+2?", "a": "4 é"}


def made(function: Function, payload: bytes | None = None) -> Any:
    """Return the row that a function makes, parsed."""
    payload = json.dumps(ROW).encode() if payload is None else payload
    return json.loads(transformed(payload, Transform.of(function)))


def rejected(function: Function) -> tuple[str, str]:
    with pytest.raises(RowRejected) as caught:
        made(function)
    return caught.value.reason, caught.value.detail


def test_a_row_or_a_list_of_messages_is_made() -> None:
    messages = [{"role": "user", "content": "x"}]
    assert made(lambda row: {**row, "b": (1, 2)}) == {**ROW, "b": [1, 2]}
    assert made(lambda row: messages) == {"messages": messages}
    assert made(lambda row: tuple(messages)) == {"messages": messages}


def test_none_leaves_the_row_out() -> None:
    assert rejected(lambda row: None)[0] == "left_out_by_transform"


def test_an_exception_has_its_line() -> None:
    def fails(row: Any) -> Any:
        return row["missing"]

    line = fails.__code__.co_firstlineno + 1
    assert rejected(fails) == (
        "transform_error",
        f"KeyError: 'missing' (line {line} of test_made_rows.py)",
    )


def test_an_exception_within_a_library_has_the_line_of_the_function() -> None:
    def parses(row: Any) -> Any:
        return json.loads(row["q"])

    line = parses.__code__.co_firstlineno + 1
    detail = f"JSONDecodeError (line {line} of test_made_rows.py)"
    assert rejected(parses) == ("transform_error", detail)


def test_text_that_may_quote_the_row_is_not_kept() -> None:
    def refuses(row: Any) -> Any:
        raise ValueError(f"bad {row}")

    assert "2+2?" not in rejected(refuses)[1]


def test_an_end_of_the_process_is_an_exception() -> None:
    def exits(row: Any) -> Any:
        raise SystemExit(3)

    assert rejected(exits)[1].startswith("SystemExit (line ")


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        (17, "a value of type int"),
        ("text", "a value of type str"),
        ({"a": {1, 2}}, "in the row that it returned: a: a value of type set"),
        ({"a": float("nan")}, "a: nan, which JSON has no number for"),
        ([{"prompt": "a"}, {"prompt": "b"}], "a list of dicts without a role; expected one row"),
        ([{"role": "user", "content": b"x"}], r"messages[0].content: a value of type bytes"),
    ],
)
def test_what_is_no_row_is_rejected(value: Any, detail: str) -> None:
    with pytest.raises(RowRejected) as caught:
        transformed(b"{}", Transform("rows:f", "", lambda row: value))
    assert caught.value.reason == "transform_error"
    assert detail in caught.value.detail


@pytest.mark.parametrize("payload", [b"{broken", UNREADABLE_ROW, b"[1]", b'"x"', b"[" * 100_000])
def test_what_cannot_be_read_does_not_reach_the_function(payload: bytes) -> None:
    def never(row: Any) -> Any:
        raise AssertionError

    assert transformed(payload, Transform.of(never)) == payload


def test_what_has_no_number_is_null() -> None:
    assert made(lambda row: row, b'{"a": NaN, "b": -Infinity}') == {"a": None, "b": None}
