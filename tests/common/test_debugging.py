"""What is shown of an error: the error alone, unless its cause is asked for."""

from __future__ import annotations

import traceback
from collections.abc import Iterator

import pytest

from miles.common.debugging import VARIABLE, is_debugging, mistake_of_ours, one_paragraph, unchained
from miles.errors import SourceError


def inner() -> None:
    try:
        raise KeyError("messages")
    except KeyError as error:
        raise SourceError("a.jsonl: row 3 is broken") from error


@unchained
def front_door() -> None:
    inner()


@unchained
def rows() -> Iterator[int]:
    yield 1
    inner()


def shown_of_front_door() -> str:
    with pytest.raises(SourceError) as caught:
        front_door()
    return "".join(traceback.format_exception(caught.value))


def shown_of_rows() -> str:
    with pytest.raises(SourceError) as caught:
        list(rows())
    return "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("shown_of", [shown_of_front_door, shown_of_rows])
def test_an_error_of_ours_stands_alone(shown_of: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(shown_of)
    monkeypatch.delenv(VARIABLE, raising=False)
    alone = shown_of()
    assert "KeyError" not in alone
    assert "inner()" not in alone

    monkeypatch.setenv(VARIABLE, "1")
    with_cause = shown_of()
    assert "KeyError: 'messages'" in with_cause
    assert "inner()" in with_cause


def test_a_generator_stays_one() -> None:
    assert next(iter(rows())) == 1
    assert rows.__name__ == "rows"


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False), ("off", False)]
)
def test_debugging_is_switched_by_the_environment(
    value: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    assert is_debugging() is expected


def test_the_text_of_a_library_becomes_one_line() -> None:
    text = (
        "\x1b[36mray::task()\x1b[39m\nTraceback (most recent call last):\n  File x\nOSError: full"
    )
    assert one_paragraph(text) == "OSError: full"
    assert one_paragraph("a\n  b\tc") == "a b c"
    assert "hunter2" not in one_paragraph("at https://host/x?key=hunter2")
    assert len(one_paragraph("x" * 10_000)) < 700


def test_a_lack_of_memory_is_no_mistake() -> None:
    assert mistake_of_ours(MemoryError()).startswith("out of memory")
