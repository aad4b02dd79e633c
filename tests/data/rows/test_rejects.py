"""Every reason for which a row is rejected, and a detail without the row's text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.raw_rows import ANSWER, ASK, rejected

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
        ({"conversations": [SECRET]}, "nothing_to_train"),
        ({"conversations": [SECRET, 3]}, "bad_message"),
        ({"conversations": [[SECRET, SECRET], [SECRET]]}, "bad_message"),
        ({"conversations": [ASK, {"from": "gpt", "value": None}]}, "bad_message"),
        ({"conversations": [ASK, {"from": "gpt", "value": 4}]}, "bad_message"),
        ({"conversations": [ASK, {"from": "gpt", "value": {SECRET: 4}}]}, "bad_message"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "text": SECRET}]}]},
            "has_image",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": "", "tool_calls": [{"function": SECRET}]}
                ]
            },
            "bad_message",
        ),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": SECRET}]}, "bad_message"),
        ({"conversations": [ASK, {"from": "gpt", "value": SECRET + "\ud800"}]}, "bad_message"),
        ({"conversations": [{"from": 40 * "x" + SECRET, "value": ""}]}, "unknown_role"),
        ({"conversations": [{"value": SECRET}, ANSWER]}, "unknown_role"),
        ({"conversations": [{"from": ["gpt"], "value": SECRET}]}, "unknown_role"),
        ({"conversations": [{"from": "human", "value": SECRET}]}, "nothing_to_train"),
        (
            b'{"messages": [{"role": "assistant", "content": NaN, "a": "'
            + SECRET.encode()
            + b'"}]}',
            "bad_message",
        ),
        ({"conversations": [ASK, ANSWER], "system": {"a": SECRET}}, "bad_message"),
        (
            {"messages": [{**ANSWER, "a": json.loads("[" * 150 + f'"{SECRET}"' + "]" * 150)}]},
            "bad_message",
        ),
        ({"messages": json.dumps([{**ANSWER, "value": SECRET + "\ud800"}])}, "malformed_json"),
        ({"messages": [ANSWER], "tools": json.dumps([{SECRET: "\udfff"}])}, "malformed_json"),
        ({"messages": [ANSWER], "tools": "[" * 150 + f'"{SECRET}"' + "]" * 150}, "malformed_json"),
    ],
)
def test_rejects(row: Any, reason: str) -> None:
    found, detail = rejected(row)
    assert found == reason
    assert detail
    assert SECRET not in detail


@pytest.mark.parametrize(
    ("shape", "row", "reason"),
    [
        ("alpaca", {"instruction": SECRET}, "no_messages"),
        ("alpaca", {"instruction": SECRET, "output": None}, "no_messages"),
        ("alpaca", {"instruction": "", "input": None, "output": SECRET}, "no_messages"),
        ("alpaca", {"instruction": SECRET, "output": {"a": 4}}, "bad_message"),
        ("alpaca", {"instruction": [SECRET], "output": "4"}, "bad_message"),
        ("alpaca", {"instruction": SECRET, "input": [4], "output": "4"}, "bad_message"),
        ("alpaca", {"instruction": SECRET, "output": "4\ud800"}, "bad_message"),
        ("alpaca", {"instruction": SECRET, "output": "4", "history": 3}, "bad_message"),
        ("alpaca", {"instruction": SECRET, "output": "4", "history": "[["}, "malformed_json"),
        ("alpaca", {"instruction": "a", "output": "4", "history": [[SECRET]]}, "bad_message"),
        ("alpaca", {"instruction": "a", "output": "4", "history": [[SECRET, None]]}, "bad_message"),
        (
            "alpaca",
            {"instruction": "a", "output": "4", "system": 3, "source": SECRET},
            "bad_message",
        ),
        ("prompt_completion", {"prompt": SECRET, "completion": None}, "no_messages"),
        ("prompt_completion", {"prompt": SECRET, "completion": []}, "no_messages"),
        ("prompt_completion", {"prompt": SECRET, "completion": [4]}, "bad_message"),
        ("prompt_completion", {"prompt": {"a": SECRET}, "completion": "4"}, "no_messages"),
        ("prompt_completion", {"prompt": [SECRET], "completion": "4"}, "bad_message"),
        (
            "prompt_completion",
            {"prompt": [{"role": "x", "content": SECRET}], "completion": "4"},
            "unknown_role",
        ),
        ("text", {"text": None, "a": SECRET}, "no_messages"),
        ("text", {SECRET: 1}, "no_messages"),
        ("text", {"text": [SECRET]}, "bad_message"),
        ("text", {"text": {"a": SECRET}}, "bad_message"),
        ("text", {"text": SECRET + "\ud800"}, "bad_message"),
        ("text", {"text": "", "a": SECRET}, "nothing_to_train"),
        ("text", {"text": " \n\u3000", "a": SECRET}, "nothing_to_train"),
        ("text", [SECRET], "not_an_object"),
    ],
)
def test_rejects_of_other_shapes(shape: str, row: Any, reason: str) -> None:
    found, detail = rejected(row, shape)
    assert found == reason
    assert detail
    assert SECRET not in detail
