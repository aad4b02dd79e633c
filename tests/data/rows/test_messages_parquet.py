"""What is written reads back to the conversation that it was, whatever shape its row had."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.data.config import RowFormat, SourceConfig
from miles.data.files.manifest import build_manifest
from miles.data.files.read import read_rows
from miles.data.files.row_json import table_to_json
from miles.data.rejecting import or_rejected
from miles.data.rows.json_text import MAX_DEPTH
from miles.data.rows.messages_parquet import messages_table
from miles.data.rows.normalize import normalize
from miles.data.step_schemas import MESSAGES
from miles.data.types import EXTRA, Conversation, RowRejected


def write(conversations: list[Conversation]) -> pa.Table:
    row_ids = np.arange(len(conversations), dtype=np.int64)
    return messages_table(row_ids, np.zeros(len(row_ids), np.int32), ("rows",), conversations)


def read_back(
    conversations: list[Conversation], folder: Path
) -> tuple[RowFormat, list[Conversation]]:
    pq.write_table(write(conversations), folder / "part-00000.parquet")
    manifest = build_manifest([SourceConfig("again", (str(folder),))])
    format = manifest.sources[0].format
    return format, [
        normalize(row, format) for row in read_rows(manifest, np.arange(manifest.num_rows))
    ]


def call(**keys: Any) -> dict[str, Any]:
    return {
        "id": "c1",
        "type": "function",
        "function": {"name": "f", "arguments": {"b": [None, 1.0], "a": "é"}},
    } | keys


ASK, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
TOOL_ROW = {
    "messages": [
        {"role": "user", "content": "2+2?", "name": "Ann"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call(), call(id=None)],
            "reasoning_content": "hm",
        },
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call(function={"name": "g", "arguments": '{"x":  null}'})],
        },
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call(function={"name": "g", "parameters": {"x": 1}})],
        },
        {"role": "assistant", "content": "", "tool_calls": [{"name": "flat", "arguments": "{}"}]},
        {"role": "assistant", "content": "", "tool_calls": [call(index=3), call(id=7)]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call(function={"name": "g", "arguments": " "})],
        },
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call(function={"name": "g", "strict": True})],
        },
        {
            "role": "assistant",
            "content": "4",
            "thinking": "hm",
            "name": 3,
            "citations": [{"at": 1}],
            "extra": "x",
        },
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"b": {}, "a": 1}}}],
}


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ("messages", [TOOL_ROW, {"messages": [ASK, ANSWER]}]),
        (
            "messages",
            [{"messages": [ASK, ANSWER | {"weight": w}, ASK, ANSWER]} for w in (0, 1, None)],
        ),
        (
            "messages",
            [
                {
                    "conversations": [
                        {"from": "human", "value": "a"},
                        {"from": "gpt", "value": ""},
                    ],
                    "system": "s",
                }
            ],
        ),
        ("messages", [{"messages": [ASK, ANSWER], "tools": '[{"name": "f", "default": null}]'}]),
        (
            "messages",
            [
                {"messages": [ASK, ANSWER], "chat_template_kwargs": {"a": None, "b": [1.0, "é"]}},
                {"messages": [ASK, ANSWER]},
            ],
        ),
        (
            "alpaca",
            [
                {
                    "instruction": "a",
                    "input": "b",
                    "output": "c",
                    "system": "s",
                    "history": [["x", "y"]],
                }
            ],
        ),
        ("prompt_completion", [{"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}]),
        (
            "prompt_completion",
            [
                {
                    "prompt": [ASK, ANSWER, ASK],
                    "completion": [ANSWER, ASK, ANSWER | {"train": False}],
                }
            ],
        ),
        ("text", [{"text": " a\n\u2028😀"}, {"text": "[1]"}]),
    ],
)
def test_every_shape(tmp_path: Path, shape: str, rows: list[dict[str, Any]]) -> None:
    conversations = [normalize(json.dumps(row).encode(), RowFormat(shape)) for row in rows]
    format, again = read_back(conversations, tmp_path)
    assert again == conversations
    assert format == RowFormat("text" if shape == "text" else "messages")


def test_arguments_are_json_text_and_flags_weights() -> None:
    row = {
        "messages": [
            ASK,
            ANSWER | {"weight": 0},
            ANSWER | {"tool_calls": [call()], "weight": 1, "note": 1},
            ANSWER,
        ]
    }
    table = write([normalize(json.dumps(row).encode())])
    assert table.schema == MESSAGES
    (written,) = table.to_pylist()
    assert [message["weight"] for message in written["messages"]] == [None, 0, 1, None]
    (function,) = [one["function"] for one in written["messages"][2]["tool_calls"]]
    assert function["arguments"] == '{"b": [null, 1.0], "a": "é"}'
    assert written["messages"][2][EXTRA] == '{"note": 1}'
    assert (written["tools"], written["text"]) == (None, None)
    (text,) = write([Conversation((), None, (), "a")]).to_pylist()
    assert (text["messages"], text["tools"], text["text"]) == (None, None, "a")


def test_what_is_nested_as_deeply_as_is_allowed() -> None:
    deep = json.loads("[" * (MAX_DEPTH - 1) + "1" + "]" * (MAX_DEPTH - 1))
    turn = ANSWER | {"a": deep, "tool_calls": [{"name": "f", "arguments": json.dumps({"a": deep})}]}
    conversation = normalize(json.dumps({"messages": [turn]}).encode())
    (row,) = table_to_json(write([conversation]))
    assert normalize(row) == conversation


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from(["", "a", "{}", '{"a": null}', "[1]", "\ud83d"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
    ),
    max_leaves=6,
)
arguments = st.sampled_from(["", " ", "null", None, "{}", '{"a": null}', {"b": [None]}, [1]])
functions = st.fixed_dictionaries(
    {"name": st.just("f")},
    optional={"arguments": arguments, "parameters": arguments, "strict": values},
)
calls = functions | st.fixed_dictionaries(
    {"function": functions}, optional={"id": values, "type": values, "i": values}
)
content_parts = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": st.sampled_from(["", "a"])}),
    st.fixed_dictionaries({"type": st.just("thinking"), "thinking": st.just("hm")}),
    st.fixed_dictionaries(
        {"type": st.just("tool_use"), "name": st.just("f")}, optional={"id": values}
    ),
    st.fixed_dictionaries(
        {"type": st.just("tool_result"), "content": st.just("nine")},
        optional={"tool_use_id": values, "is_error": values},
    ),
)
contents = st.sampled_from(["", "a", "<tool_response>\na\n</tool_response>"]) | st.lists(
    content_parts, min_size=1, max_size=2
)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": contents},
    optional={
        "tool_calls": st.lists(calls, max_size=2),
        "function_call": functions,
        "weight": st.sampled_from([0, 1, None]),
        **dict.fromkeys(("name", "reasoning_content", "tool_call_id", "extra", "thinking"), values),
        **dict.fromkeys(("value", "from", "text"), values),
    },
) | st.builds(
    lambda value, flag: {"role": "tool_call", "content": json.dumps(value), "train": flag},
    functions,
    st.sampled_from([True, None]),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(turns, min_size=1, max_size=3),
    st.lists(st.dictionaries(st.just("a"), values), max_size=2),
)
def test_any_conversation(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> None:
    row = {"messages": [*messages, ANSWER], "tools": tools}
    if "\\ud" in json.dumps(row):  # no text: rejected, and not written
        return
    conversation = or_rejected(normalize, json.dumps(row).encode())
    if isinstance(conversation, RowRejected):  # arguments that are no object, parts in no order, …
        assert conversation.reason in ("bad_tool_call", "bad_message", "partial_turn")
        return
    (written,) = table_to_json(write([conversation]))
    again = normalize(written)
    assert json.dumps(asdict(again), sort_keys=True) == json.dumps(
        asdict(conversation), sort_keys=True
    )
    for before, after in zip(
        conversation.messages, again.messages, strict=True
    ):  # a template may write calls as JSON
        assert json.dumps(after.get("tool_calls")) == json.dumps(before.get("tool_calls"))


@pytest.mark.parametrize("name", ["glaive_tools_en", "openhermes_sample"])
def test_real_rows(assets: Path, tmp_path: Path, name: str) -> None:
    manifest = build_manifest([SourceConfig(name, (str(assets / f"data/{name}.parquet"),))])
    conversations = [
        normalize(row, manifest.sources[0].format) for row in read_rows(manifest, np.arange(300))
    ]
    assert read_back(conversations, tmp_path)[1] == conversations
    if name == "glaive_tools_en":
        called = [
            call
            for c in conversations
            for message in c.messages
            for call in message.get("tool_calls", ())
        ]
        assert called
        assert all(isinstance(call["function"]["arguments"], dict) for call in called)
