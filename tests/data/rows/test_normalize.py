"""Every shape of row that is understood, and what the row says of each turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.data.config import ROLE_NAMES, ROW_FIELDS, RowFormat, SourceConfig
from miles.data.files.manifest import build_manifest
from miles.data.files.read import read_rows
from miles.data.files.row_columns import USUAL_PAIRS
from miles.data.rows.normalize import normalize
from miles.data.rows.turns import TRAIN_FLAGS
from miles.data.types import Conversation, RowRejected
from tests.support.raw_rows import ANSWER, ASK, normalized, rejected, texts


def test_openhermes_own_columns() -> None:
    row = {
        "conversations": [{**ASK, "weight": None}, {**ANSWER, "weight": None}],
        "system_prompt": "Be brief.",
        "source": "airoboros2.2",
        "category": None,
        "id": None,
        "skip_prompt_formatting": False,
    }
    conversation = normalized(row)
    assert conversation.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    )
    assert conversation.flags == (None, None, None)
    assert conversation.text is None
    assert conversation.tools is None
    for empty in (None, ""):
        assert len(normalized(row | {"system_prompt": empty}).messages) == 2


@pytest.mark.parametrize(
    ("turn", "told"),
    [(" Be brief.\n", " Be brief.\n"), ("", "Be brief."), ("You are K. Be brief.", None)],
)
def test_a_system_column_beside_a_system_turn(turn: str, told: str | None) -> None:
    row = {
        "conversations": [{"from": "system", "value": turn}, ASK, ANSWER],
        "system_prompt": "Be brief.",
    }
    assert texts(normalized(row))[0] == ("system", told or turn)
    assert len(normalized(row).messages) == 3


def test_two_system_turns_that_differ_drop_the_row() -> None:
    turns = [{"from": "system", "value": "Rhyme."}, ASK, ANSWER]
    reason, detail = rejected({"conversations": turns, "system_prompt": "Be brief."})
    assert reason == "bad_message"
    assert "column system_prompt holds a system turn, and message 0 is another one" in detail


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *((name, "user") for name in ("human", "user")),
        *((name, "assistant") for name in ("gpt", "assistant", "model", "chatgpt", "bing", "bard")),
        *((name, "tool") for name in ("tool", "observation", "function_response")),
        ("system", "system"),
    ],
)
def test_roles(name: str, role: str) -> None:
    conversation = normalized({"conversations": [ASK, {"from": name, "value": "x"}, ANSWER]})
    assert conversation.messages[1] == {"role": role, "content": "x"}
    assert conversation.flags == (None, None, None)


@pytest.mark.parametrize("key", TRAIN_FLAGS)
def test_a_row_says_which_turns_are_trained(key: str) -> None:
    for off in (0, 0.0, False):
        turns = [
            {**ASK, key: 1},
            {**ANSWER, key: off},
            ASK,
            {**ANSWER, key: 1},
            {**ANSWER, key: None},
        ]
        conversation = normalized({"conversations": turns})
        assert conversation.flags == (None, False, None, True, None)  # a user's says nothing
        assert key not in conversation.messages[1]
        assert rejected({"conversations": [ASK, {**ANSWER, key: off}]})[0] == "nothing_to_train"
    assert normalized({"conversations": [ASK, {**ANSWER, key: "0"}, ANSWER]}).flags[1] is False
    call = {"from": "function_call", "value": '{"name": "f"}', key: False}
    assert normalized({"conversations": [ASK, call, ANSWER]}).flags == (None, False, None)


def test_nan_is_as_null() -> None:
    turn = b'{"role": "assistant", "content": "4", "weight": NaN, "x": -Infinity}'
    row = b'{"messages": [' + turn + b'], "score": NaN}'
    conversation = normalize(row)
    assert (conversation.messages, conversation.flags) == (
        ({"role": "assistant", "content": "4"},),
        (None,),
    )


def test_the_column_of_the_conversation() -> None:
    turns = [ASK, ANSWER]
    assert len(normalized({"messages": None, "conversations": turns}).messages) == 2
    assert len(normalized({"chat": turns, "messages": []}, messages="chat").messages) == 2
    assert len(normalized({"messages": json.dumps(turns)}).messages) == 2
    assert (
        len(
            normalized(
                {"messages": [ASK], "conversations": turns}, messages="conversations"
            ).messages
        )
        == 2
    )
    assert rejected({"messages": turns}, messages="chat")[0] == "no_messages"


def test_further_keys_as_json_text() -> None:
    def message(**keys: Any) -> Any:
        return normalized({"messages": [{"role": "assistant", "content": "4", **keys}]}).messages[0]

    plain = {"role": "assistant", "content": "4"}
    assert message(extra='{"note": {"a": null}, "role": "user"}') == plain | {"note": {"a": None}}
    assert message(extra='{"tool_calls": [{"name": "f"}]}')["tool_calls"] == [
        {"name": "f", "arguments": {}}
    ]
    for own in ("text", "[1]", {"a": 1}):
        assert message(extra=own) == plain | {"extra": own}


def test_role_names() -> None:
    row = {"messages": [{"role": "Npc", "content": "a"}, {"role": "model", "content": "b"}, ANSWER]}
    assert rejected(row)[0] == "unknown_role"
    conversation = normalized(row, roles={"Npc": "assistant", "model": "user"})
    assert [message["role"] for message in conversation.messages] == [
        "assistant",
        "user",
        "assistant",
    ]
    for role in ("system", "user", "assistant", "tool"):
        row = {"messages": [{"role": "x", "content": "a"}, ANSWER]}
        assert normalized(row, roles={"x": role}).messages[0] == {"role": role, "content": "a"}


@pytest.mark.parametrize(
    ("instruction", "given", "question"),
    [
        ("Add.", "2 2", "Add.\n2 2"),
        ("Add.", "", "Add."),
        ("Add.", None, "Add."),
        (None, "2+2?", "2+2?"),
    ],
)
def test_alpaca(instruction: str | None, given: str | None, question: str) -> None:
    row = {"instruction": instruction, "input": given, "output": "4", "text": "### Instruction …"}
    assert texts(normalized(row, "alpaca")) == [("user", question), ("assistant", "4")]


def test_alpaca_history_and_system() -> None:
    row = {"instruction": "And 3+3?", "response": "6", "context": None, "system": "Be brief."}
    asked = [("user", "And 3+3?"), ("assistant", "6")]
    for nothing in (None, [], "", "[]"):
        assert texts(normalized(row | {"history": nothing}, "alpaca")) == [
            ("system", "Be brief."),
            *asked,
        ]
    conversation = normalized(row | {"history": [["2+2?", "4"]]}, "alpaca")
    assert texts(conversation) == [
        ("system", "Be brief."),
        ("user", "2+2?"),
        ("assistant", "4"),
        *asked,
    ]
    assert conversation.flags == (None,) * 5
    named = normalized({"q": "2+2?", "a": "4"}, "alpaca", instruction="q", output="a")
    assert texts(named) == [("user", "2+2?"), ("assistant", "4")]


@pytest.mark.parametrize("pair", USUAL_PAIRS)
def test_prompt_and_completion(pair: tuple[str, str]) -> None:
    conversation = normalized(
        {pair[0]: "2+2?", pair[1]: "4", "system": "Be brief."}, "prompt_completion"
    )
    assert texts(conversation) == [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4")]
    assert conversation.flags == (None, None, None)


def test_only_the_completion_is_trained() -> None:
    prompt = [{"role": "system", "content": "s"}, ASK, ANSWER, {**ANSWER, "weight": 1}, ASK]
    completion = [ANSWER, ASK, {**ANSWER, "weight": 0}, {**ANSWER, "weight": 1}]
    conversation = normalized({"prompt": prompt, "completion": completion}, "prompt_completion")
    assert [message["role"] for message in conversation.messages] == [
        *(
            "system",
            "user",
            "assistant",
            "assistant",
            "user",
            "assistant",
            "user",
            "assistant",
            "assistant",
        )
    ]
    assert conversation.flags == (None, None, False, False, None, None, None, False, True)
    assert texts(normalized({"prompt": [ASK], "completion": "4"}, "prompt_completion")) == [
        ("user", "2+2?"),
        ("assistant", "4"),
    ]
    assert (
        rejected({"prompt": [ASK, ANSWER], "completion": [ASK]}, "prompt_completion")[0]
        == "nothing_to_train"
    )
    detail = rejected(
        {"prompt": [ASK], "completion": [ANSWER, {"role": "x"}]}, "prompt_completion"
    )[1]
    assert detail.startswith("column completion, turn 1: ")


def test_a_named_column_excludes_the_usual() -> None:
    row = {
        "question": "2+2?",
        "answer": "4",
        "prompt": "no",
        "completion": "no",
        "body": "b",
        "text": "no",
    }
    named = normalized(row, "prompt_completion", prompt="question", completion="answer")
    assert texts(named) == [("user", "2+2?"), ("assistant", "4")]
    assert texts(normalized(row, "prompt_completion", prompt="question"))[1] == (
        "assistant",
        "no",
    )  # the usual one
    assert normalized(row, "text", text="body").text == "b"
    for shape, columns in (
        ("text", {"text": "gone"}),
        ("messages", {"messages": "gone"}),
        ("alpaca", {"output": "gone"}),
        ("prompt_completion", {"completion": "gone"}),
    ):
        reason, detail = rejected(
            row | {"messages": [ANSWER], "instruction": "i", "output": "o"}, shape, **columns
        )
        assert reason == "no_messages"
        assert "gone" in detail


def test_plain_text() -> None:
    assert normalized({"text": " a\n", "messages": None}, "text") == Conversation(
        (), None, (), " a\n"
    )


def test_a_byte_order_mark_is_skipped() -> None:
    assert (
        len(
            normalize(
                b"\xef\xbb\xbf" + json.dumps({"conversations": [ASK, ANSWER]}).encode()
            ).messages
        )
        == 2
    )


def test_the_shape_must_be_detected() -> None:
    with pytest.raises(AssertionError):
        normalize(b"{}", RowFormat())


def test_characters_beyond_the_basic_plane_are_text() -> None:
    assert (
        normalized({"conversations": [ASK, {"from": "gpt", "value": "😀 \\ud800"}]}).messages[1][
            "content"
        ]
        == "😀 \\ud800"
    )


KEYS = (
    *(
        "messages",
        "conversations",
        "role",
        "from",
        "value",
        "content",
        "tool_calls",
        "tools",
        "weight",
        "text",
        "extra",
    ),
    *(
        "instruction",
        "input",
        "output",
        "history",
        "system",
        "prompt",
        "completion",
        "name",
        "arguments",
        "function",
    ),
    *("function_call", "functions", "metadata", "train_detail", "image", "speaker", "assistant"),
    *("user", "type", "parameters"),
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["gpt", "user", "{}", "[1]", "tool_call", "Tool", "0", "tool_use", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
    ),
    max_leaves=25,
)


@settings(max_examples=500, deadline=None)
@given(json_values, st.sampled_from(list(ROW_FIELDS)))
def test_any_json_is_a_conversation_or_rejected(row: Any, shape: str) -> None:
    try:
        conversation = normalized(row, shape)
    except RowRejected:  # with a known reason, which its constructor asserts
        return
    assert len(conversation.messages) == len(conversation.flags)
    if shape == "text":
        assert conversation.text
        assert conversation.text.strip()
        return
    trained = [
        flag is not False for message, flag in pairs(conversation) if message["role"] == "assistant"
    ]
    assert any(trained)
    assert all(
        flag is None for message, flag in pairs(conversation) if message["role"] != "assistant"
    )
    assert all(isinstance(message["content"], str) for message in conversation.messages)
    assert {message["role"] for message in conversation.messages} <= set(ROLE_NAMES)


def pairs(conversation: Conversation) -> list[tuple[Any, bool | None]]:
    return list(zip(conversation.messages, conversation.flags, strict=True))


@pytest.mark.parametrize(
    ("name", "num_rows"), [("openhermes_sample", 16_418), ("glaive_tools_en", 300)]
)
def test_every_real_row(assets: Path, name: str, num_rows: int) -> None:
    manifest = build_manifest([SourceConfig(name, (str(assets / f"data/{name}.parquet"),))])
    conversations = [normalize(row) for row in read_rows(manifest, np.arange(num_rows))]
    assert {message["role"] for c in conversations for message in c.messages} <= {
        "system",
        "user",
        "assistant",
        "tool",
    }
    if name == "glaive_tools_en":
        assert any("tool_calls" in message for c in conversations for message in c.messages)
        assert any(c.tools for c in conversations)
