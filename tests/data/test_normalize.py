"""Every shape of row that is understood, and every reason for which one is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.data.config import SourceConfig
from miles.data.manifest import build_manifest
from miles.data.normalize import normalize
from miles.data.read import read_rows
from miles.data.types import RowRejected

ASK = {"from": "human", "value": "2+2?"}
ANSWER = {"from": "gpt", "value": "4"}


def of(row: Any, **keys: str) -> Any:
    return normalize(json.dumps(row).encode(), **keys)


def rejected(row: Any, **keys: str) -> tuple[str, str]:
    payload = row if isinstance(row, bytes) else json.dumps(row).encode()
    with pytest.raises(RowRejected) as caught:
        normalize(payload, **keys)
    return caught.value.reason, caught.value.detail


def test_openhermes_own_columns() -> None:
    row = {
        "conversations": [{**ASK, "weight": None}, {**ANSWER, "weight": None}],
        "system_prompt": "Be brief.",
        "source": "airoboros2.2",
        "category": None,
        "id": None,
        "skip_prompt_formatting": False,
    }
    conversation = of(row)
    assert conversation.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    )
    assert conversation.trained == (False, False, True)
    assert conversation.tools is None
    for empty in (None, ""):
        assert len(of(row | {"system_prompt": empty}).messages) == 2
    own = [{"from": "system", "value": "Rhyme."}, *row["conversations"]]
    assert of(row | {"conversations": own}).messages[0]["content"] == "Rhyme."
    assert len(of(row | {"conversations": own}).messages) == 3


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
    conversation = of({"conversations": [ASK, {"from": name, "value": "x"}, ANSWER]})
    assert conversation.messages[1] == {"role": role, "content": "x"}
    assert conversation.trained == (False, role == "assistant", True)


def test_openai_messages_keep_what_templates_read() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": null}'}}
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": [call | {"index": None}], "reasoning_content": "hm"},
            {"role": "tool", "content": "4", "tool_call_id": "c1", "tool_calls": None},
            {"role": "assistant", "content": "4", "tool_calls": [], "reasoning_content": None},
        ]
    }
    conversation = of(row)
    assert conversation.messages == (
        {"role": "user", "content": "ab", "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
        {"role": "assistant", "content": "4"},
    )
    assert conversation.trained == (False, True, False, True)


def test_sharegpt_function_calls() -> None:
    one = {"name": "f", "arguments": {"x": 1}}
    for value, calls in (
        (json.dumps(one), [one]),
        (json.dumps([one, {"name": "g"}]), [one, {"name": "g", "arguments": {}}]),
    ):
        turns = [ASK, {"from": "function_call", "value": value}, {"from": "observation", "value": "1"}, ANSWER]
        conversation = of({"conversations": turns})
        assert conversation.messages[1] == {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": call} for call in calls],
        }
        assert conversation.trained == (False, True, False, True)
    for value in ("not json", "[]", "3", '{"arguments": {}}', '["f"]'):
        reason, detail = rejected({"conversations": [ASK, {"from": "function_call", "value": value}, ANSWER]})
        assert (reason, detail[:6]) == ("bad_message", "turn 1")


@pytest.mark.parametrize("flag", ["weight", "train", "loss", "step_loss_mask"])
def test_a_row_can_exclude_a_turn(flag: str) -> None:
    for off in (0, 0.0, False):
        conversation = of({"conversations": [ASK, {**ANSWER, flag: off}, ASK, {**ANSWER, flag: 1}]})
        assert conversation.trained == (False, False, False, True)
        assert flag not in conversation.messages[1]
        assert rejected({"conversations": [ASK, {**ANSWER, flag: off}]})[0] == "nothing_to_train"
    assert rejected({"conversations": [ASK, {**ANSWER, flag: "0"}]})[0] == "bad_message"


def test_tools_as_text_or_list() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    row = {"conversations": [ASK, ANSWER]}
    without_nulls = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert of(row | {"tools": json.dumps([tool])}).tools == (tool,)  # its author's text
    assert of(row | {"tools": [json.dumps(tool)]}).tools == (tool,)
    assert of(row | {"tools": [tool]}).tools == (without_nulls,)  # Parquet's nulls
    assert of(row | {"functions": [without_nulls]}, tools_key="functions").tools == (without_nulls,)
    for nothing in (None, "", " ", [], "[]"):
        assert of(row | {"tools": nothing}).tools is None
    assert rejected(row | {"tools": "[{"})[0] == "malformed_json"
    assert rejected(row | {"tools": {"a": 1}})[0] == "bad_message"
    assert rejected(row | {"tools": [3]})[0] == "bad_message"


def test_the_column_of_the_conversation() -> None:
    turns = [ASK, ANSWER]
    assert len(of({"messages": None, "conversations": turns}).messages) == 2
    assert len(of({"chat": turns, "messages": []}, messages_key="chat").messages) == 2
    assert len(of({"messages": json.dumps(turns)}).messages) == 2
    assert rejected({"messages": turns}, messages_key="chat")[0] == "no_messages"


SECRET = "hunter2"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"", "malformed_json"),
        (b'{"messages": "' + SECRET.encode(), "malformed_json"),
        (b'{"a": "' + SECRET.encode() + b'\xff"}', "malformed_json"),
        (b"[" * 100_000, "malformed_json"),
        (b'{"a": ' + b"1" * 5_000 + b"}", "malformed_json"),
        ([SECRET], "not_an_object"),
        (SECRET, "not_an_object"),
        ({SECRET: 1}, "no_messages"),
        ({"conversations": None}, "no_messages"),
        ({"conversations": []}, "no_messages"),
        ({"conversations": {SECRET: 1}}, "no_messages"),
        ({"messages": "{" + SECRET}, "malformed_json"),
        ({"conversations": [SECRET]}, "bad_message"),
        ({"conversations": [ASK, {"from": "gpt", "value": None}]}, "bad_message"),
        ({"conversations": [ASK, {"from": "gpt", "value": 4}]}, "bad_message"),
        ({"conversations": [ASK, {"from": "gpt", "value": {SECRET: 4}}]}, "bad_message"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "text": SECRET}]}]}, "bad_message"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": SECRET}]}]}, "bad_message"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": SECRET}]}, "bad_message"),
        ({"conversations": [ASK, {"from": "gpt", "value": SECRET + "\ud800"}]}, "bad_message"),
        ({"conversations": [{"from": SECRET, "value": ""}]}, "unknown_role"),
        ({"conversations": [{"value": SECRET}, ANSWER]}, "unknown_role"),
        ({"conversations": [{"from": ["gpt"], "value": SECRET}]}, "unknown_role"),
        ({"conversations": [{"from": "human", "value": SECRET}]}, "nothing_to_train"),
    ],
)
def test_rejects(row: Any, reason: str) -> None:
    found, detail = rejected(row)
    assert found == reason
    assert detail
    assert SECRET not in detail


def test_characters_beyond_the_basic_plane_are_text() -> None:
    assert of({"conversations": [ASK, {"from": "gpt", "value": "😀 \\ud800"}]}).messages[1]["content"] == "😀 \\ud800"


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from(["gpt", "user", "{}", "[1]"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
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
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=25,
)


@settings(max_examples=300, deadline=None)
@given(json_values)
def test_any_json_is_a_conversation_or_rejected(row: Any) -> None:
    try:
        conversation = of(row)
    except RowRejected:  # with a known reason, which its constructor asserts
        return
    assert len(conversation.messages) == len(conversation.trained)
    assert True in conversation.trained
    assert all(isinstance(message["content"], str) for message in conversation.messages)


@pytest.mark.parametrize(("name", "num_rows"), [("openhermes_sample", 16_418), ("glaive_tools_en", 300)])
def test_every_real_row(assets: Path, name: str, num_rows: int) -> None:
    manifest = build_manifest([SourceConfig(name, (str(assets / f"data/{name}.parquet"),))])
    conversations = [normalize(row) for row in read_rows(manifest, np.arange(num_rows))]
    assert {message["role"] for c in conversations for message in c.messages} <= {"system", "user", "assistant", "tool"}
    if name == "glaive_tools_en":
        assert any("tool_calls" in message for c in conversations for message in c.messages)
        assert any(c.tools for c in conversations)
