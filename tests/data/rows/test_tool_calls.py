"""Tool calls of OpenAI and ShareGPT, as objects and as JSON text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from miles.data.types import Conversation, RowRejected
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
                "tool_calls": [call],
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


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"a":  1, "b": null}', {"a": 1, "b": None}),
        (' {"é": "\\u00e9"}', {"é": "é"}),
        ("{}", {}),
        ("", {}),
        (" \n", {}),
        ("null", {}),
        (' "{\\"a\\": 1}"', {"a": 1}),  # encoded twice
        ('""', {}),
        (None, {}),
        ({"a": 1}, {"a": 1}),
    ],
)
def test_arguments_become_objects(text: Any, arguments: Any) -> None:
    for call in (
        {"name": "f", "arguments": text},
        {"function": {"arguments": text, "name": "f"}, "type": "function"},
    ):
        (read,) = with_call(call).messages[1]["tool_calls"]
        assert read.get("function", read) == {"name": "f", "arguments": arguments}
        assert list(read) in (
            ["type", "function"],
            ["name", "arguments"],
        )  # a template may write it as JSON


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[1]", "the JSON text of a list"),
        ('"a"', "text that is not JSON: Expecting value at character 0 of 1"),
        ("3", "the JSON text of a number"),
        ("true", "the JSON text of true or false"),
        ("{not json}", "text that is not JSON"),
        ("{'a': 1}", "text that is not JSON"),
        ('{"a": 1', "text that is not JSON: Expecting ',' delimiter at character 7 of 7"),
        ('{"a": NaN}', "a number"),
        ('{"a": 1e999}', "a number"),
        ('{"a": "\\ud800"}', "half of a character"),
        ('{"a":' + 200 * "[" + 200 * "]" + "}", "nested too deeply"),
        ('"\\"\\\\\\"{}\\\\\\"\\""', "the JSON text of text"),  # encoded four times
        ([1], "a list, not an object"),
        (3, "a number, not an object"),
        (False, "true or false, not an object"),
    ],
)
def test_other_arguments_drop_the_row(text: Any, what: str) -> None:
    for call in ({"name": "f", "arguments": text}, {"function": {"name": "f", "arguments": text}}):
        with pytest.raises(RowRejected) as caught:
            with_call({"name": "g"}, call)
        assert caught.value.reason == "bad_tool_call"
        assert caught.value.detail.startswith("turn 1: tool call 1: its arguments are ")
        assert what in caught.value.detail
    turns = [ASK, {"from": "function_call", "value": json.dumps({"name": "f", "arguments": text})}]
    assert rejected({"conversations": [*turns, ANSWER]})[0] == "bad_tool_call"


@pytest.mark.parametrize("key", ["parameters", "args", "input"])
def test_arguments_under_other_names(key: str) -> None:
    (read,) = with_call({"id": "1", "name": "f", "arguments": None, key: '{"a": 1}'}).messages[1][
        "tool_calls"
    ]
    assert read == {"id": "1", "name": "f", "arguments": {"a": 1}}
    twice = {"name": "f", "arguments": {"a": 1}, key: {"a": 1}}
    assert with_call(twice).messages[1]["tool_calls"] == [{"name": "f", "arguments": {"a": 1}}]


def with_call(*calls: Any) -> Conversation:
    """Return the conversation of a row with these tool calls in its answer."""
    asked = {"role": "user", "content": "?"}
    return normalized({"messages": [asked, {"role": "assistant", "tool_calls": list(calls)}]})


def test_legacy_function_call() -> None:
    called = {"name": "f", "arguments": '{"x": 1}'}
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    for content, text in ((None, ""), ("I shall look.", "I shall look.")):
        for call in (called, json.dumps(called)):
            answer = {"role": "assistant", "content": content, "function_call": call}
            result = {"role": "function", "name": "f", "content": "nine"}
            conversation = normalized({"messages": [ASK, answer, result, ANSWER]})
            assert conversation.messages[1:3] == (
                {"role": "assistant", "content": text, "tool_calls": calls},
                {"role": "tool", "content": "nine", "name": "f"},
            )
    for nothing in (None, "", " ", {}, {"name": None, "arguments": None}):
        answer = {"role": "assistant", "content": "4", "function_call": nothing}
        asked = {"role": "user", "content": "?", "function_call": nothing}
        assert normalized({"messages": [asked, answer]}).messages[1] == {
            "role": "assistant",
            "content": "4",
        }
    both = {"role": "assistant", "function_call": called, "tool_calls": [called]}
    assert rejected({"messages": [ASK, both]})[0] == "bad_tool_call"
    for key, value in (("function_call", called), ("tool_calls", [called])):
        asked = {"role": "user", "content": "?", key: value}
        assert rejected({"messages": [asked, ANSWER]})[0] == "bad_tool_call"
    for bad, reason in (({"x": 1}, "bad_message"), ({**called, "arguments": [1]}, "bad_tool_call")):
        answer = {"role": "assistant", "content": "", "function_call": bad}
        assert rejected({"messages": [ASK, answer]})[0] == reason


def assistant(**keys: Any) -> dict[str, Any]:
    asked = {"role": "user", "content": "Slot?"}
    return {"messages": [asked, {"role": "assistant", "content": "", **keys}]}


@pytest.mark.parametrize(
    ("call", "reason", "key"),
    [
        ({"name": "f", "kwargs": {"x": 1}}, "bad_tool_call", "kwargs"),
        ({"name": "f", "arguments": {}, "args_json": '{"x": 1}'}, "bad_tool_call", "args_json"),
        ({"name": "f", "city": "Paris"}, "bad_tool_call", "city"),
        ({"function": {"name": "f"}, "arguments": {"x": 1}}, "bad_tool_call", "arguments"),
        ({"function": {"name": "f", "arguments": {}}, "input": {"x": 1}}, "bad_tool_call", "input"),
        ({"name": "f", "arguments": {}, "parameters": {"x": 1}}, "bad_tool_call", "parameters"),
        ({"name": "f", "arguments": {"x": [1e999]}}, "bad_tool_call", "number"),
        ({"name": "f", "arguments": {"x": float("nan")}}, "bad_tool_call", "number"),
        ({"name": "f", "arguments": '{"x": 1e999}'}, "bad_tool_call", "number"),
        ({"function": {"name": "f", "arguments": {}}, "weight": 0}, "partial_turn", "not trained"),
        ({"name": "f", "arguments": {}, "train": False}, "partial_turn", "not trained"),
    ],
)
def test_calls_that_are_not_understood_whole(call: Any, reason: str, key: str) -> None:
    """No argument is lost, and none of a number that JSON does not have is trained."""
    for row in (assistant(tool_calls=[call]), assistant(function_call=call)):
        if call.get("function") and "function_call" in row["messages"][1]:
            call = {"type": "function", **call}
        found, detail = rejected(row)
        assert found == reason
        assert key in detail
        assert "Paris" not in detail


def test_keys_of_a_call_that_cannot_be_arguments() -> None:
    flat = {
        "id": "1",
        "type": "function",
        "index": 0,
        "name": "f",
        "kwargs": {},
        "parameters": None,
    }
    call = normalized(assistant(tool_calls=[flat])).messages[1]["tool_calls"][0]
    assert call["arguments"] == {}
    same = {"name": "f", "arguments": '{"x": 1}', "input": {"x": 1}, "train": 1}
    call = normalized(assistant(tool_calls=[same])).messages[1]["tool_calls"][0]
    assert call == {"name": "f", "arguments": {"x": 1}}
    beside = {"function": {"name": "f", "arguments": {"x": 1.5}}, "weight": 1, "city": "Paris"}
    call = normalized(assistant(tool_calls=[beside])).messages[1]["tool_calls"][0]
    assert call == {"function": {"name": "f", "arguments": {"x": 1.5}}, "city": "Paris"}


@pytest.mark.parametrize("number", [b"1e999", b"[1e999]", b"NaN", b"-Infinity"])
def test_numbers_that_json_does_not_have(number: bytes) -> None:
    call = json.dumps(assistant(tool_calls=[{"name": "f", "arguments": {"x": 7}}])).encode()
    assert rejected(call.replace(b"7", number))[0] == "bad_tool_call"
    weighed = json.dumps(assistant(weight=7) | {"note": "NaN"}).encode()
    for infinity in (b"1e999", b"Infinity"):
        assert rejected(weighed.replace(b"7", infinity))[0] == "fractional_weight"
