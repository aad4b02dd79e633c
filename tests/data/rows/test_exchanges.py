"""Questions and answers in columns of their own: numbers, reasoning, preferences, names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.data.config import RowFormat
from miles.data.rows.normalize import normalize
from tests.support.raw_rows import normalized, rejected, texts

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
HI_HELLO = [("user", "Hi"), ("assistant", "Hello")]


@pytest.mark.parametrize(
    "number", ["2", "-0", "1.50", "1e5", "123456789012345678901234567890", "1E400", "true", "false"]
)
@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ("alpaca", '{"id": 7, "instruction": "a", "output": %s}'),
        ("prompt_completion", '{"question": "a", "answer": %s, "score": 0.10}'),
        ("prompt_completion", '{"Question": "a", "Answer": %s}'),
        ("preference", '{"prompt": "a", "chosen": %s}'),
        ("text", '{"text": %s}'),
    ],
)
def test_a_number_is_the_text_of_the_file(shape: str, row: str, number: str) -> None:
    conversation = normalize((row % number).encode(), RowFormat(shape))
    text = conversation.text if shape == "text" else conversation.messages[-1]["content"]
    assert text == number


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans())
def test_any_number_is_read(number: Any) -> None:
    row = {"deep": {"q": number}, "answer": "4"}
    written = json.dumps(number)
    assert texts(normalized(row, "prompt_completion", prompt="deep.q")) == [
        ("user", written),
        ("assistant", "4"),
    ]


@pytest.mark.parametrize(
    ("value", "reasoning"),
    [
        ("First, add.", "First, add."),
        (["First, add."], "First, add."),
        *((switch, None) for switch in ("on", " OFF\n", True, None, "", " ", "high")),
        (["a", "b"], None),
        ({"a": 1}, None),
    ],
)
@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ("alpaca", {"instruction": "2+2?", "output": "4"}),
        ("prompt_completion", {"problem": "2+2?", "solution": "4"}),
        ("prompt_completion", {"prompt": [CHAT[0]], "completion": [CHAT[1]]}),
    ],
)
def test_a_column_of_reasoning(
    shape: str, row: dict[str, Any], value: Any, reasoning: str | None
) -> None:
    for name in ("reasoning", "Thinking", "Complex_CoT", "thinking_trajectories"):
        answer = normalized({**row, name: value}, shape).messages[-1]
        assert answer.get("reasoning_content") == reasoning


def test_an_answer_keeps_its_own_thoughts() -> None:
    row = {"question": "2+2?", "answer": "<think>\nAdd.\n</think>\n\n4", "reasoning": "Sum up."}
    assert "reasoning_content" not in normalized(row, "prompt_completion").messages[-1]
    named = {"question": "2+2?", "answer": "4", "why": ["a", "b"], "reasoning": "no"}
    assert rejected(named, "prompt_completion", reasoning="why")[0] == "bad_message"
    named["why"] = "on"
    answer = normalized(named, "prompt_completion", reasoning="why").messages[-1]
    assert answer["reasoning_content"] == "on"


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": CHAT},
        {"chosen": CHAT, "prompt": "Hi"},
        {"chosen": CHAT, "prompt": CHAT[:1]},
        {"chosen": CHAT[1:], "prompt": CHAT[:1]},
        {"chosen": CHAT[1], "prompt": "Hi"},
        {"chosen": "Hello", "prompt": "Hi"},
        {"chosen": "Hello", "question": "Hi"},
        {"chosen": "Hello", "prompt": CHAT[:1]},
        {"chosen": " Hello", "prompt": "\n\nHuman: Hi\n\nAssistant:"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello"},
        {"chosen": {"role": ["user", "assistant"], "content": ["Hi", "Hello"]}},
    ],
)
def test_the_chosen_side_is_taken(row: dict[str, Any]) -> None:
    found = texts(normalized({**row, "rejected": "Go"}, "preference"))
    assert [(role, content.strip()) for role, content in found] == HI_HELLO


def test_a_preference_as_alpaca_has_it() -> None:
    row = {"instruction": "Say", "input": "Hi", "chosen": "Hello", "rejected": "Go"}
    assert texts(normalized(row, "preference")) == [("user", "Say\nHi"), ("assistant", "Hello")]


def test_answers_of_a_prompt_are_not_trained() -> None:
    row = {"prompt": [*CHAT, CHAT[0]], "chosen": [CHAT[1]]}
    assert normalized(row, "preference").flags == (None, False, None, None)
    assert normalized({"chosen": [*CHAT, *CHAT]}, "preference").flags == (None,) * 4


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": CHAT, "prompt": "Something else"}, "bad_message"),
        ({"chosen": CHAT, "prompt": [{"role": "system", "content": "s"}]}, "bad_message"),
        ({"chosen": "Hello"}, "no_messages"),
        ({"chosen": None, "prompt": "Hi"}, "no_messages"),
        ({"chosen": ["Hi", "Hello"], "prompt": "Hi"}, "bad_message"),
    ],
)
def test_a_preference_that_is_not_clear_is_dropped(row: dict[str, Any], reason: str) -> None:
    assert rejected(row, "preference")[0] == reason


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        (json.dumps(CHAT[:1]), json.dumps(CHAT[1:])),
        (json.dumps(CHAT[:1]), "Hello"),
        ("Hi", json.dumps(CHAT[1:])),
        (CHAT[:1], json.dumps(CHAT[1:])),
        (CHAT[:1], CHAT),  # the whole conversation: its question is not asked twice
        (json.dumps(CHAT[:1]), json.dumps(CHAT)),
        ("Hi", CHAT),
    ],
)
def test_sides_as_json_text_and_whole_conversations(prompt: Any, completion: Any) -> None:
    row = {"prompt": prompt, "completion": completion}
    conversation = normalized(row, "prompt_completion")
    assert texts(conversation) == HI_HELLO
    assert conversation.flags == (None, None)


@pytest.mark.parametrize(
    "completion",
    [
        json.dumps(CHAT),  # asked for as JSON
        '[{"role": "engineer", "content": "Ann"}]',
        '["a", "b"]',
        "[not JSON]",
    ],
)
def test_json_that_an_answer_says_is_text(completion: str) -> None:
    row = {"prompt": "Write a chat as JSON.", "completion": completion}
    assert texts(normalized(row, "prompt_completion"))[1] == ("assistant", completion)


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>",
        "<bos><start_of_turn>user\n2+2?<end_of_turn>\n",
        "<s>[INST] 2+2? [/INST]",
    ],
)
def test_a_prompt_that_was_rendered_is_not_rendered_again(prompt: str) -> None:
    row = {"prompt": prompt, "completion": "4"}
    reason, detail = rejected(row, "prompt_completion")
    assert reason == "bad_message"
    assert "rendered by a chat template beforehand" in detail


@pytest.mark.parametrize(
    "prompt",
    ["<|im_start|> is which token?", "What is <|im_start|>user?", "[INST] in Llama 2?", "<s> 2+2?"],
)
def test_a_question_about_templates_is_kept(prompt: str) -> None:
    row = {"prompt": prompt, "completion": "4"}
    assert texts(normalized(row, "prompt_completion"))[0] == ("user", prompt)


def test_a_system_turn_before_a_whole_conversation() -> None:
    system = {"role": "system", "content": "s"}
    row = {"prompt": [system, CHAT[0]], "completion": CHAT}
    assert texts(normalized(row, "prompt_completion")) == [("system", "s"), *HI_HELLO]


@pytest.mark.parametrize(
    ("answers", "cause"),
    [
        ("[{'name': 'f', 'arguments': {}}]", "single quotes"),
        ('[{"name": "f", "argum', "cut off"),
        ('{"name": "f", "arguments": {}', "cut off"),
    ],
)
def test_calls_that_cannot_be_read_drop_the_row(answers: str, cause: str) -> None:
    row = {"query": "2+2?", "answers": answers}
    reason, detail = rejected(row | {"tools": '[{"name": "f"}]'}, "prompt_completion")
    assert reason == "bad_tool_call"
    assert cause in detail
    assert texts(normalized(row, "prompt_completion"))[1] == ("assistant", answers)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ("[]", "bad_message"),
        ('[{"arguments": {}}]', "bad_message"),
        ('["4", "four"]', "bad_message"),
        (["4", "four"], "bad_message"),
    ],
)
def test_answers_that_are_no_calls_are_dropped(answers: Any, reason: str) -> None:
    assert rejected({"query": "2+2?", "answers": answers}, "prompt_completion")[0] == reason


def test_calls_as_values_and_one_alone() -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    for answers in ([call], '{"name": "f", "arguments": {"x": 1}}'):
        row = {"query": "2+2?", "answers": answers, "tools": '[{"name": "f"}]'}
        conversation = normalized(row, "prompt_completion")
        assert conversation.messages[-1]["tool_calls"] == [{"type": "function", "function": call}]
        assert conversation.tools == ({"type": "function", "function": {"name": "f"}},)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"a": {"b": ["x", "Hi"]}, "answer": "Hello"}, {"prompt": "a.b.1"}),
        ({"a.b": "Hi", "a": {"b": "no"}, "answer": "Hello"}, {"prompt": "a.b"}),
        ({"QUESTION": "Hi", "aNSWER": "Hello"}, {}),
        ({"Question": "Hi", "question": None, "Answer": "Hello"}, {}),
        ({"Question": "no", "question": "Hi", "answer": "Hello"}, {}),
        ({"inputs": "Hi", "Targets": "Hello"}, {}),
    ],
)
def test_columns_are_found(row: dict[str, Any], columns: dict[str, str]) -> None:
    assert texts(normalized(row, "prompt_completion", **columns)) == HI_HELLO


@pytest.mark.parametrize("path", ["a.b.2", "a.b.x", "a.c", "b.a", "a.b.1.z", "a.b.-1", "a.", "."])
def test_a_path_that_leads_nowhere(path: str) -> None:
    row = {"a": {"b": ["x", "Hi"]}, "answer": "Hello"}
    reason, detail = rejected(row, "prompt_completion", prompt=path)
    assert reason == "no_messages"
    assert path in detail
