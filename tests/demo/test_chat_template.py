"""The demo's template against exact texts, and against Qwen3's own where that is at hand."""

from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer

from miles.demo.tokenizer import CHAT_TEMPLATE

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city, now – in °C",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}},
}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


Q = user("What is 2 + 2?")
A = assistant("4.")
CALL = assistant("", tool_calls=[call("get_weather", {"city": "Zürich"})])
CALLS = assistant(
    "Let me look.",
    tool_calls=[call("get_weather", '{"city": "Rome"}'), {"name": "get_time", "arguments": {}}],
)

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [Q, A],
    "question alone": [Q],
    "system": [system("Be brief."), Q, A],
    "system in the middle": [Q, A, system("Now be long."), Q, A],
    "multi-turn": [
        Q,
        A,
        user("And 3 + 3?"),
        assistant("6."),
        user("Thanks"),
        assistant("Welcome!"),
    ],
    "ends with a user": [Q, A, user("And 3 + 3?")],
    "no query": [system("Speak."), assistant("Hello.")],
    "reasoning": [Q, assistant("4.", reasoning_content="Two and two.\n")],
    "earlier reasoning": [
        Q,
        assistant("4.", reasoning_content="Two and two."),
        Q,
        assistant("4", reasoning_content="again"),
    ],
    "reasoning in the content": [Q, assistant("<think>\nTwo and two.\n</think>\n\n4.")],
    "earlier reasoning in the content": [Q, assistant("<think>\nTwo.\n</think>\n\n4."), Q, A],
    "two think blocks": [Q, assistant("<think>one</think>x<think>two</think>\n\ny")],
    "a closing tag alone": [Q, assistant("thought\n</think>\n\n4.")],
    "empty think in the content": [
        Q,
        assistant("<think>\n\n</think>\n\n4."),
        Q,
        assistant("<think></think>4"),
    ],
    "line breaks around": [user("\nhi\n"), assistant("\n\n4.\n"), Q, assistant("\n\n\n4.\n\n")],
    "two answers in a row": [Q, assistant("One."), assistant("Two.", reasoning_content="more")],
    "reasoning before a second answer": [
        Q,
        assistant("One.", reasoning_content="first"),
        assistant("Two."),
    ],
    "blank reasoning before a second answer": [
        Q,
        assistant("One.", reasoning_content="\n"),
        assistant("Two."),
    ],
    "tool call": [Q, CALL],
    "tool result": [Q, CALL, tool("21 °C"), assistant("It is 21 degrees.")],
    "two calls, two results": [
        system("Help."),
        Q,
        CALLS,
        tool("20"),
        tool("12:00"),
        assistant("Noon, 20."),
    ],
    "reasoning between calls": [
        Q,
        assistant(
            "", reasoning_content="I need it.", tool_calls=[call("get_weather", {"city": "Oslo"})]
        ),
        tool("3"),
        assistant("Cold.", reasoning_content="3 is cold."),
        user("Thanks"),
        A,
    ],
    "calls with null content": [
        Q,
        assistant(None, tool_calls=[call("get_time", {})]),
        tool("12"),
        A,
    ],
    "calls after line breaks": [
        Q,
        assistant("\n", tool_calls=[call("get_time", {})]),
        tool("12"),
        A,
    ],
    "results as a user turn": [
        Q,
        CALL,
        user("<tool_response>\n21\n</tool_response>"),
        assistant("21."),
    ],
    "reasoning before a result as a user turn": [
        Q,
        assistant("", reasoning_content="I need it.", tool_calls=[call("get_time", {})]),
        user("<tool_response>\n12:00\n</tool_response>"),
        assistant("Noon."),
    ],
    "results first": [tool("1"), tool("2"), A],
    "results last": [Q, CALL, tool("1"), tool("2")],
    "text that spells the markup": [user("say <|im_start|>assistant\n"), assistant("<|im_end|>")],
    "parts": [user("a"), {"role": "user", "content": [{"type": "text", "text": "b"}]}, A],
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"add_generation_prompt": True},
    {"add_generation_prompt": True, "enable_thinking": False},
    {"add_generation_prompt": True, "enable_thinking": True},
    {"tools": [WEATHER, CLOCK]},
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path):
    return AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)


def render(tokenizer, messages: list[dict[str, Any]], **settings: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **settings)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_same_text_as_qwen3(tokenizer, assets: Path, name):
    qwen3 = (assets / "qwen3-tokenizer" / "chat_template.jinja").read_text(encoding="utf-8")
    for settings in SETTINGS:
        ours = render(tokenizer, CONVERSATIONS[name], **settings)
        assert ours == render(tokenizer, CONVERSATIONS[name], chat_template=qwen3, **settings)


def test_is_the_demo_template(tokenizer):
    assert tokenizer.chat_template == CHAT_TEMPLATE.read_text(encoding="utf-8")


def test_only_the_last_answer_has_think_block(tokenizer):
    assert render(tokenizer, [system("Be brief."), Q, A, user("Sure?"), assistant("Yes.")]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n4.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nYes.<|im_end|>\n"
    )


def test_reasoning_before_the_last_query_is_dropped(tokenizer):
    text = render(tokenizer, CONVERSATIONS["earlier reasoning"])
    assert "Two and two." not in text
    assert text.endswith("<|im_start|>assistant\n<think>\nagain\n</think>\n\n4<|im_end|>\n")


def test_generation_prompt(tokenizer):
    asked = "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert render(tokenizer, [Q], add_generation_prompt=True) == asked
    without = render(tokenizer, [Q], add_generation_prompt=True, enable_thinking=False)
    assert without == asked + "<think>\n\n</think>\n\n"


def test_tools_and_grouped_results(tokenizer):
    text = render(tokenizer, CONVERSATIONS["two calls, two results"], tools=[CLOCK])
    assert text.startswith("<|im_start|>system\nHelp.\n\n# Tools\n\n")
    assert '\n<tools>\n{"type": "function", "function": {"name": "get_time"' in text
    assert (
        "<|im_start|>assistant\nLet me look.\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n20\n</tool_response>\n"
        "<tool_response>\n12:00\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nNoon, 20.<|im_end|>\n"
    ) in text


def test_a_tool_result_is_no_query(tokenizer):
    text = render(tokenizer, CONVERSATIONS["reasoning before a result as a user turn"])
    assert "<|im_start|>assistant\n<think>\nI need it.\n</think>\n\n<tool_call>" in text


def test_unknown_role_is_refused(tokenizer):
    # Qwen3's own template leaves such a turn out without a word
    with pytest.raises(TemplateError, match="unknown role: narrator"):
        render(tokenizer, [Q, {"role": "narrator", "content": "The moon rose."}, A])
