"""The shape of a source's rows, told from the first of them, and what is said where it cannot
be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.data.config import ROW_FIELDS, RowFormat, SourceConfig
from miles.data.files.row_columns import USUAL_COLUMNS, USUAL_PAIRS, known_columns
from miles.data.files.row_shapes import MAIN_FIELDS, detect_format, find_columns
from miles.errors import ConfigError, SourceError

CHAT = [{"role": "user", "content": "2+2?"}]


def detect(rows: list[Any], shape: str = "auto", **columns: str) -> RowFormat:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return detect_format(SourceConfig("s", ("p",), RowFormat(shape, columns)), rows, names)


@pytest.mark.parametrize(
    ("row", "shape", "columns"),
    [
        ({"conversations": CHAT, "source": "x"}, "messages", {"messages": "conversations"}),
        (
            {"conversation": CHAT, "system": "s"},
            "messages",
            {"messages": "conversation", "system": "system"},
        ),
        (
            {"messages": '[{"role": "user"}]', "tools": "[]"},
            "messages",
            {"messages": "messages", "tools": "tools"},
        ),
        ({"prompt": "x", "prompt_id": "1", "messages": CHAT}, "messages", {"messages": "messages"}),
        (
            {"instruction": "a", "input": "", "output": "b", "text": "c"},
            "alpaca",
            {"instruction": "instruction", "input": "input", "output": "output"},
        ),
        (
            {"instruction": "a", "context": "c", "response": "b", "category": "x"},
            "alpaca",
            {"instruction": "instruction", "input": "context", "output": "response"},
        ),
        ({"conversation": "c-17", "prompt": "a", "completion": "b"}, "prompt_completion", None),
        ({"messages": 12, "question": "a", "answer": "b"}, "prompt_completion", None),
        (
            {"prompt": CHAT, "completion": CHAT},
            "prompt_completion",
            {"prompt": "prompt", "completion": "completion"},
        ),
        (
            {"system_prompt": "s", "question": "a", "response": "b"},
            "prompt_completion",
            {"prompt": "question", "completion": "response", "system": "system_prompt"},
        ),
        ({"text": "a", "messages": None, "prompt": None, "tools": None}, "text", {"text": "text"}),
        ({"text": "a", "messages": [], "instruction": "", "output": ""}, "text", {"text": "text"}),
    ],
)
def test_shapes_and_their_columns(
    row: dict[str, Any], shape: str, columns: dict[str, str] | None
) -> None:
    format = detect([row])
    assert format == RowFormat(shape)
    if columns is not None:
        found = find_columns(format, [row])
        assert found == columns
        assert list(found) == [field for field in ROW_FIELDS[shape] if field in found]


@pytest.mark.parametrize("pair", USUAL_PAIRS)
def test_every_usual_pair(pair: tuple[str, str]) -> None:
    assert find_columns(detect([{pair[0]: "a", pair[1]: "b"}]), [{pair[0]: "a", pair[1]: "b"}]) == {
        "prompt": pair[0],
        "completion": pair[1],
    }


def test_most_rows_decide_the_shape() -> None:
    chat, text = {"messages": CHAT}, {"text": "a"}
    assert detect([text, chat]).shape == "messages"
    assert detect([chat, text, text]).shape == "text"
    assert detect([{}, {"other": 1}, text]).shape == "text"


@given(st.lists(st.sampled_from(list(MAIN_FIELDS)), min_size=1, max_size=8))
def test_the_shape_is_the_most_frequent(shapes: list[str]) -> None:
    values = {"messages": CHAT, "chosen": CHAT, "transcript": "Human: a"}
    rows = [{field: values.get(field, "a") for field in MAIN_FIELDS[shape]} for shape in shapes]
    found = detect(rows).shape
    assert shapes.count(found) == max(shapes.count(shape) for shape in shapes)
    assert all(
        shapes.count(shape) < shapes.count(found)
        for shape in list(MAIN_FIELDS)[: [*MAIN_FIELDS].index(found)]
    )


@pytest.mark.parametrize(
    ("named", "shape"),
    [
        ({"messages": "chat"}, "messages"),
        ({"text": "body"}, "text"),
        ({"text": "body", "tools": "functions"}, "text"),
        ({"prompt": "ask"}, "prompt_completion"),
        ({"output": "answer"}, "alpaca"),
        ({"instruction": "ask", "output": "reply"}, "alpaca"),
    ],
)
def test_named_columns_decide(named: dict[str, str], shape: str) -> None:
    row: Mapping[str, Any] = {
        "chat": CHAT,
        "body": "a",
        "ask": "a",
        "reply": "b",
        "messages": CHAT,
        "text": "a",
        "instruction": "a",
        "answer": "b",
        "completion": "c",
    }
    format = detect([row], **named)
    kept = {field: column for field, column in named.items() if field in ROW_FIELDS[shape]}
    assert format == RowFormat(shape, kept)  # a text has no tools
    assert find_columns(format, [row]).items() >= kept.items()
    assert set(named.values()) <= known_columns(RowFormat("auto", named))


def test_a_named_shape_is_not_doubted() -> None:
    for shape in MAIN_FIELDS:
        assert detect([{"i": 1}], shape) == RowFormat(shape)
    assert detect([{"messages": CHAT, "text": "a"}], "text").shape == "text"


def test_columns_of_later_rows_count() -> None:
    rows = [{"messages": CHAT, "tools": None}, {"conversations": CHAT, "tools": []}]
    assert find_columns(RowFormat("messages"), rows) == {"messages": "messages", "tools": "tools"}


def test_what_fits_nothing_is_named() -> None:
    with pytest.raises(SourceError) as caught:
        detect([{"chosen": "a", "rejected": "b"}, {"score": 1}])
    message = str(caught.value)
    for part in (
        "source 's'",
        "chosen, rejected, score",
        "2 rows",
        "--row-shape",
        "--column-names",
        "--input-key",
    ):
        assert part in message
    for names in (*USUAL_PAIRS, USUAL_COLUMNS["messages"], ("instruction", "output/response")):
        assert all(name in message for name in names)
    with pytest.raises(SourceError, match=r"expected columns .* for messages: chat"):
        detect([{"messages": CHAT}], messages="chat")
    with pytest.raises(SourceError, match="no columns"):
        detect([])


def test_names_of_two_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'s': --column-names .* names messages, prompt, which"):
        detect([{"messages": CHAT}], messages="messages", prompt="a")
    with pytest.raises(ConfigError, match="'prompt' is no field of --row-shape text: text"):
        RowFormat("text", {"prompt": "a"})
    with pytest.raises(ConfigError, match="must be the name of a column, not 3"):
        RowFormat("text", {"text": 3})  # type: ignore[dict-item]
