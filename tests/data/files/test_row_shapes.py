"""The shape of a source's rows, told from the first of them, and what is said where it cannot
be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.data.config import ROW_FIELDS, RowFormat, SourceConfig
from miles.data.files.row_columns import (
    FURTHER_PAIRS,
    USUAL_COLUMNS,
    USUAL_PAIRS,
    known_columns,
)
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


PLAIN_SHAPES = ("messages", "alpaca", "prompt_completion", "text")
OTHER_SHAPES = ("preference", "transcript", "text")


@given(
    st.lists(st.sampled_from(PLAIN_SHAPES), min_size=1, max_size=8)
    | st.lists(st.sampled_from(OTHER_SHAPES), min_size=1, max_size=8)
)
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
        detect([{"loser": 0, "winner": 1}, {"score": 1}])
    message = str(caught.value)
    for part in (
        "source 's'",
        "loser, winner, score",
        "2 rows",
        "--row-shape",
        "--column-names",
        "--input-key",
        "prompt and completion",
        "instruction and output/response",
        *USUAL_COLUMNS["messages"],
    ):
        assert part in message
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


TURNS = [*CHAT, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    ("row", "shape", "columns"),
    [
        ({"text": "a", "problem": "2+2?", "solution": "4"}, "prompt_completion", None),
        ({"text": "a", "instruction": "2+2?", "output": 4}, "alpaca", None),
        ({"text": "a", "data": TURNS}, "messages", {"messages": "data"}),
        ({"text": "a", "data": "a", "content": "b", "chat": "c"}, "text", {"text": "text"}),
        ({"text": "a", "chosen": TURNS}, "preference", {"chosen": "chosen"}),
        (
            {"chat": "USER: 2+2?", "system": "s"},
            "transcript",
            {"transcript": "chat", "system": "system"},
        ),
        ({"chat": {"turn_1": {"Human": "a", "MOSS": "b"}}}, "messages", {"messages": "chat"}),
        ({"data": ["2+2?", "4"]}, "messages", {"messages": "data"}),
        ({"dialog": [["2+2?", "4"]]}, "messages", {"messages": "dialog"}),
        ({"messages": {"role": ["user"], "content": ["a"]}}, "messages", {"messages": "messages"}),
        (
            {"instruction": "a", "input": "b", "target": "c"},
            "alpaca",
            {"instruction": "instruction", "input": "input", "output": "target"},
        ),
        (
            {"question": "a", "attempt": "b", "solution": "c", "thinking": "d"},
            "prompt_completion",
            {"prompt": "question", "completion": "attempt", "reasoning": "thinking"},
        ),
        (
            {"question": "a", "attempt": "b", "solution": "c", "thinking": "off"},
            "prompt_completion",
            {"prompt": "question", "completion": "solution"},
        ),
        (
            {"Question": "a", "Answer": "b", "Text": "c", "Thinking": "d"},
            "prompt_completion",
            {"prompt": "Question", "completion": "Answer", "reasoning": "Thinking"},
        ),
        (
            {"prompt": "a", "response": "b", "chosen": TURNS},
            "prompt_completion",
            {"prompt": "prompt", "completion": "response"},
        ),
    ],
)
def test_the_strongest_sign_in_a_row_counts(
    row: dict[str, Any], shape: str, columns: dict[str, str] | None
) -> None:
    format = detect([row])
    assert format == RowFormat(shape)
    if columns is not None:
        assert find_columns(format, [row]) == columns


@pytest.mark.parametrize("pair", FURTHER_PAIRS)
def test_every_further_pair(pair: tuple[str, str]) -> None:
    row = {pair[0]: "a", pair[1]: "b"}
    if pair[1] == "attempt":
        row["cot"] = "c"
    found = find_columns(detect([row]), [row])
    assert (found["prompt"], found["completion"]) == pair


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"input": 3, "output": 5}, ("input, output",)),  # a table of numbers
        (
            {"text": "a", "steps": TURNS},
            ("column steps holds the turns", "--input-key steps", "--row-shape text"),
        ),
        ({"body": {"log": TURNS}}, ("--input-key body.log",)),
        ({"body": {"it's": TURNS}}, ("--input-key 'body.it'\"'\"'s'",)),
        (
            {"id": 1, "qa": [{"question": "a", "answer": "b"}] * 2},
            ("Column qa holds many rows within one", "--input-key qa"),
        ),
        (
            {"data": {"train": [{"problem": "a", "solution": "b"}] * 3}},
            ("Column data.train holds many rows within one: a list of up to 3",),
        ),
        (
            {"0": {"prompt": "a", "output": "b"}, "1": {"prompt": "c", "output": "d"}},
            ("The object holds many rows within one, each under a key of its own (0, 1)",),
        ),
        (
            {"prompt": "a", "completion": None},
            ("Column completion is null", '{"prompt": "prompt", "completion": "COLUMN"}'),
        ),
        (
            {"prompt": "", "completion": "b"},
            ("Column prompt is empty", '{"prompt": "COLUMN", "completion": "completion"}'),
        ),
        (
            {"prompt": "a", "canonical": "b", "test": "c", "entry": "d"},
            ("one of canonical, test, entry", '{"prompt": "prompt", "completion": "COLUMN"}'),
        ),
        (
            {"prompt": "a", "agent's": "b"},
            ('"agent\'"\'"\'s"',),
        ),
        (
            {"conversations": CHAT, "chosen": TURNS[-1], "rejected": TURNS[-1]},
            ('--row-shape preference --column-names \'{"prompt": "conversations"}\'',),
        ),
        (
            {"meta": {"q": [{"Question": "no"}], "problem": "a", "solution": "b"}},
            ('--column-names \'{"prompt": "meta.problem", "completion": "meta.solution"}\'',),
        ),
        ({"prompt": "a", "id": 3}, ("no column holds their answers",)),
        (
            {"prompt": "a", "gold": "b"},
            ('--column-names \'{"prompt": "prompt", "completion": "gold"}\'',),
        ),
        (
            {"french": "a", "english": "b"},
            ("french and english", '\'{"prompt": "french", "completion": "english"}\''),
        ),
        ({"body": "a"}, ('--column-names \'{"text": "body"}\'',)),
        (
            {"chosen": "a", "rejected": "b"},
            ("without its question", '--column-names \'{"prompt": "COLUMN"}\''),
        ),
        (
            {"role": "User", "content": "a"},
            ("one message of a conversation", "'User'", "cannot join rows"),
        ),
        (
            {"speaker": "Ann", "text": "a", "thread_id": 1},
            ("group the rows by thread_id", "--row-shape text"),
        ),
        (
            {"data": TURNS, "problem": "a", "solution": "b"},
            ("messages (data), or prompt_completion (problem, solution)", "--row-shape messages"),
        ),
        (
            {"chosen": TURNS, "prompt": "a", "output": "b"},
            ("preference (chosen)", "--row-shape prompt_completion or preference"),
        ),
    ],
)
def test_a_refusal_says_what_rows_look_like(row: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(SourceError) as caught:
        detect([row])
    message = str(caught.value)
    for part in parts:
        assert part.lower() in message.lower()
    assert "\n" not in message


def test_the_usual_columns_of_any_row_come_first() -> None:
    chat = {"messages": CHAT}
    for other in ({"chosen": TURNS}, {"problem": "a", "solution": "b"}, {"chat": "USER: a"}):
        assert detect([other]).shape != "messages"
        assert detect([other, other, chat]).shape == "messages"


def test_a_mail_is_a_text() -> None:
    mail = {"text": "Dear all", "from": "ann@example.org", "message_id": "m1"}
    assert detect([mail]).shape == "text"


def test_the_flag_of_a_refusal_is_taken() -> None:
    row = {"data": TURNS, "problem": "a", "solution": "b", "steps": TURNS}
    for shape in ("messages", "prompt_completion"):
        assert detect([row], shape) == RowFormat(shape)
    assert detect([row], messages="steps") == RowFormat("messages", {"messages": "steps"})
    nested = {"meta": {"log": TURNS}}
    format = detect([nested], messages="meta.log")
    assert find_columns(format, [nested]) == {"messages": "meta.log"}
