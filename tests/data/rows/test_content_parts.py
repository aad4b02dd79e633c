"""Content as a list of parts: texts, Anthropic's calls, results and thoughts; tool results in tags."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.raw_rows import ANSWER, ASK, normalized, rejected

TEXT = {"type": "text", "text": "Looking."}
USE = {"type": "tool_use", "id": "t", "name": "f", "input": {"x": None}}
CALL = {"id": "t", "type": "function", "function": {"name": "f", "arguments": {"x": None}}}
THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
RESULT = {"type": "tool_result", "tool_use_id": "t", "content": "nine"}


def read(role: str, content: Any, **keys: Any) -> list[dict[str, Any]]:
    """Return the messages that a turn becomes."""
    turn = {"role": role, "content": content, **keys}
    return [dict(message) for message in normalized({"messages": [ASK, turn, ANSWER]}).messages][
        1:-1
    ]


def test_an_answer_in_parts() -> None:
    said = {"role": "assistant", "content": "Looking."}
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert read("assistant", [TEXT]) == [said]
    assert read("assistant", [USE]) == [called]
    assert read("assistant", [THOUGHT, TEXT, USE, {**USE, "id": None, "input": ""}]) == [
        said
        | {
            "reasoning_content": "Hm.",
            "tool_calls": [
                CALL,
                {"type": "function", "function": {"name": "f", "arguments": {}}},
            ],
        }
    ]
    assert read("assistant", [THOUGHT, THOUGHT], name="Ann") == [
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Hm.\n\nHm.",
            "name": "Ann",
        }
    ]


def test_results_in_a_user_turn() -> None:
    result = {"role": "tool", "content": "nine", "tool_call_id": "t"}
    in_parts = {**RESULT, "content": [{"type": "text", "text": "ni"}, {"text": "ne"}]}
    assert read("user", [RESULT, in_parts]) == [result, result]
    assert read("user", [RESULT, TEXT, TEXT], name="Ann") == [
        result,
        {"role": "user", "content": "Looking.Looking.", "name": "Ann"},
    ]
    assert read("user", [{"type": "tool_result", "is_error": True}, TEXT, RESULT]) == [
        {"role": "tool", "content": "", "is_error": True},
        {"role": "user", "content": "Looking."},
        result,
    ]


@pytest.mark.parametrize(
    ("role", "content", "reason"),
    [
        ("assistant", [USE, TEXT], "bad_message"),  # would be moved
        ("assistant", [TEXT, THOUGHT], "bad_message"),
        ("assistant", [RESULT], "bad_message"),
        ("assistant", [{"type": "redacted_thinking", "data": "x"}], "bad_message"),
        ("assistant", [{**USE, "name": None}], "bad_message"),
        ("assistant", [{**USE, "input": [1]}], "bad_tool_call"),
        ("assistant", [THOUGHT | {"thinking": None}], "bad_message"),
        ("user", [USE], "bad_message"),
        ("user", [{**RESULT, "content": {"a": 1}}], "bad_message"),
        ("user", [{**RESULT, "content": [{"type": "image", "source": {}}]}], "has_image"),
        ("user", [TEXT, {"type": "image_url", "image_url": {"url": "x"}}], "has_image"),
        ("user", [{"type": "input_audio"}], "has_image"),
        ("assistant", [{"video": "x.mp4"}], "has_image"),
        ("tool", [RESULT], "bad_message"),
    ],
)
def test_parts_that_drop_the_row(role: str, content: Any, reason: str) -> None:
    found, detail = rejected({"messages": [ASK, {"role": role, "content": content}, ANSWER]})
    assert found == reason
    assert detail.startswith("turn 1")


def test_parts_and_keys_that_say_the_same_drop_the_row() -> None:
    turn = {"role": "assistant", "content": [THOUGHT, USE], "reasoning_content": "other"}
    assert rejected({"messages": [ASK, turn]})[0] == "bad_message"


@pytest.mark.parametrize(
    ("content", "results"),
    [
        ("nine", ["nine"]),
        ("<tool_response>\nnine\n</tool_response>\n", ["nine"]),
        (" <tool_response> nine\n\n</tool_response>", [" nine\n"]),
        ("<tool_response>a</tool_response>\n<tool_response>\nb\n</tool_response>", ["a", "b"]),
        ("<tool_response>\n</tool_response>", [""]),
        ("See <tool_response>a</tool_response>", ["See <tool_response>a</tool_response>"]),
        ("<tool_response>a</tool_response> b", ["<tool_response>a</tool_response> b"]),
        ("<tool_response>a", ["<tool_response>a"]),
        ("a</tool_response>", ["a</tool_response>"]),
    ],
)
def test_tags_around_a_result_are_taken_off(content: str, results: list[str]) -> None:
    assert read("tool", content) == [{"role": "tool", "content": text} for text in results]
    assert read("user", content) == [{"role": "user", "content": content}]


def answered(parts: Any, **keys: Any) -> dict[str, Any]:
    asked = {"role": "user", "content": "2+2?"}
    return {"messages": [asked, {"role": "assistant", "content": parts, **keys}]}


def test_a_thought_of_gemini_is_reasoning() -> None:
    parts = [{"text": "Two twos.", "thought": True}, {"text": "4", "thought": False}]
    message = normalized(answered(parts)).messages[1]
    assert message == {"role": "assistant", "content": "4", "reasoning_content": "Two twos."}
    assert rejected(answered(parts[::-1]))[0] == "bad_message"
    asked = {"messages": [{"role": "user", "content": parts}, answered("4")["messages"][1]]}
    assert rejected(asked)[0] == "bad_message"


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "text", "text": "4", "weight": 0}, "partial_turn"),
        ({"type": "text", "text": "4", "train": False}, "partial_turn"),
        ({"type": "thinking", "thinking": "4", "train": False}, "partial_turn"),
        ({"type": "text", "text": "4", "weight": 0.5}, "fractional_weight"),
        ({"type": "text", "text": "4", "thinking": "Two twos."}, "bad_message"),
        ({"type": "text", "text": "4", "reasoning_content": "Two twos."}, "bad_message"),
        ({"type": "tool_use", "name": "f", "city": "Paris"}, "bad_tool_call"),
    ],
)
def test_keys_of_a_part_that_are_not_lost(part: Any, reason: str) -> None:
    assert rejected(answered([part]))[0] == reason


def test_keys_of_a_part_that_change_nothing() -> None:
    part = {"type": "text", "text": "4", "weight": 1, "thinking": "", "citations": None}
    assert normalized(answered([part])).messages[1] == {"role": "assistant", "content": "4"}
    call = {"type": "tool_use", "id": "1", "name": "f", "arguments": {"x": 1}}
    [read] = normalized(answered([call])).messages[1]["tool_calls"]
    assert read["function"] == {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    "keys",
    [
        {"reasoning_content": ["a", "b"]},
        {"reasoning": {"text": "a"}},
        {"thinking": 3},
        {"reasoning_content": "a", "thinking": "b"},
    ],
)
def test_reasoning_that_is_not_one_text(keys: dict[str, Any]) -> None:
    assert rejected(answered("4", **keys))[0] == "bad_message"


def test_reasoning_that_is_one_text() -> None:
    keys = {"reasoning_content": "a", "reasoning": "a", "thinking": []}
    message = normalized(answered("4", **keys)).messages[1]
    assert message == {
        "role": "assistant",
        "content": "4",
        "reasoning_content": "a",
        "reasoning": "a",
    }
