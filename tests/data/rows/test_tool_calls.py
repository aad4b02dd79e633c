"""Tools and tool calls of OpenAI and ShareGPT, as objects and as JSON text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.raw_rows import ANSWER, ASK, normalized, rejected


def test_openai_messages_keep_what_templates_read() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    row = {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                "name": "Ann",
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [call | {"index": None}],
                "reasoning_content": "hm",
            },
            {"role": "tool", "content": "4", "tool_call_id": "c1", "tool_calls": None},
            {"role": "assistant", "content": "4", "tool_calls": [], "reasoning_content": None},
        ]
    }
    conversation = normalized(row)
    assert conversation.messages == (
        {"role": "user", "content": "ab", "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
        {"role": "assistant", "content": "4"},
    )
    assert conversation.flags == (None, None, None, None)


def test_sharegpt_function_calls() -> None:
    one = {"name": "f", "arguments": {"x": 1}}
    for value, calls in (
        (json.dumps(one), [one]),
        (json.dumps([one, {"name": "g"}]), [one, {"name": "g", "arguments": {}}]),
        (json.dumps({"name": "f", "arguments": '{"x": 1}'}), [one]),
        (one | {"id": None}, [one]),
    ):
        turns = [
            ASK,
            {"from": "function_call", "value": value},
            {"from": "observation", "value": "1"},
            ANSWER,
        ]
        conversation = normalized({"conversations": turns})
        assert conversation.messages[1] == {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": call} for call in calls],
        }
        assert conversation.flags == (None, None, None, None)
    for value in ("not json", "[]", "3", '{"arguments": {}}', '["f"]'):
        reason, detail = rejected(
            {"conversations": [ASK, {"from": "function_call", "value": value}, ANSWER]}
        )
        assert (reason, detail[:6]) == ("bad_message", "turn 1")


def test_tools_as_text_or_list() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    row = {"conversations": [ASK, ANSWER]}
    without_nulls = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert normalized(row | {"tools": json.dumps([tool])}).tools == (tool,)  # its author's text
    assert normalized(row | {"tools": [json.dumps(tool)]}).tools == (tool,)
    assert normalized(row | {"tools": [tool]}).tools == (without_nulls,)  # Parquet's nulls
    assert normalized(row | {"functions": [without_nulls]}, tools="functions").tools == (
        without_nulls,
    )
    for nothing in (None, "", " ", [], "[]"):
        assert normalized(row | {"tools": nothing}).tools is None
    assert rejected(row | {"tools": "[{"})[0] == "malformed_json"
    for no_list in ({"a": 1}, '{"a": 1}', "0", 0, "false"):
        assert rejected(row | {"tools": no_list})[0] == "bad_message"
    assert rejected(row | {"tools": [3]})[0] == "bad_message"
    for other in ({"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"}):
        shape = "alpaca" if "output" in other else "prompt_completion"
        assert normalized(other | {"tools": json.dumps([tool])}, shape).tools == (tool,)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"a":  1, "b": null}', {"a": 1, "b": None}),
        (' {"é": "\\u00e9"}', {"é": "é"}),
        ("{}", {}),
        ("", ""),
        ("[1]", "[1]"),
        ("null", "null"),
        ('"a"', '"a"'),
        ("{not json}", "{not json}"),
        ('{"a": 1', '{"a": 1'),
        ('{"a": NaN}', '{"a": NaN}'),
        ('{"a": 1e999}', '{"a": 1e999}'),
        ('{"a": "\\ud800"}', '{"a": "\\ud800"}'),
        ('{"a":' + 200 * "[" + 200 * "]" + "}", '{"a":' + 200 * "[" + 200 * "]" + "}"),
        (None, {}),
        ({"a": 1, "b": None}, {"a": 1}),
        ([1], [1]),
    ],
)
def test_arguments_as_text_become_objects(text: Any, arguments: Any) -> None:
    for call in (
        {"name": "f", "arguments": text},
        {"function": {"arguments": text, "name": "f"}, "type": "function"},
    ):
        row = {
            "messages": [
                {"role": "user", "content": "?"},
                {"role": "assistant", "tool_calls": [call]},
            ]
        }
        (read,) = normalized(row).messages[1]["tool_calls"]
        assert read.get("function", read) == {"name": "f", "arguments": arguments}
        assert list(read) in (
            ["type", "function"],
            ["name", "arguments"],
        )  # a template may write it as JSON
