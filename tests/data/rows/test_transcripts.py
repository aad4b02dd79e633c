"""Conversations that are written as one text, and read back as the turns that they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.data.config import EncodeConfig
from miles.data.encoding.encoder import Encoder
from miles.data.rows.transcripts import read_transcript
from tests.support.raw_rows import normalized, rejected, texts
from tests.support.row_cases import require_served

FUNCTION = (
    '{\n    "name": "get_slot",\n    "parameters": {"type": "object", "properties": '
    '{"day": {"type": "string", "default": null}}}\n}'
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_slot",
        "parameters": {
            "type": "object",
            "properties": {"day": {"type": "string", "default": None}},
        },
    },
}
SYSTEM = (
    "SYSTEM: You are a helpful assistant with access to the following functions. Use them if "
    f"required -\n{FUNCTION}\n{FUNCTION}\n"
)
CHAT = (
    "USER: Is it free on Monday?\n\n\nASSISTANT: <functioncall> "
    '{"name": "get_slot", "arguments": \'{"day": "Monday\\\'s"}\'} <|endoftext|>\n\n\n'
    'FUNCTION RESPONSE: {"slot": "nine"}\n\n\nASSISTANT: At nine.\n\nOr ten. <|endoftext|>\n\n\n'
)
CALL = {
    "type": "function",
    "function": {"name": "get_slot", "arguments": {"day": "Monday's"}},
}

# Without blanks at its ends, and without the marks of any form.
SAID = st.text(st.sampled_from("ab:#<>\n é"), min_size=1, max_size=12).map(str.strip).filter(bool)
SPEAKERS = {
    "hh": ("\n\nHuman: {}", "\n\nAssistant: {}"),
    "glaive": ("USER: {}\n\n\n", "ASSISTANT: {} <|endoftext|>\n\n\n"),
    "guanaco": ("### Human: {}", "### Assistant: {}"),
}


@given(
    st.sampled_from(list(SPEAKERS)),
    st.lists(st.tuples(st.booleans(), SAID.filter(lambda text: "###" not in text)), min_size=1),
)
def test_a_transcript_is_read_back(form: str, turns: list[tuple[bool, str]]) -> None:
    written = "".join(SPEAKERS[form][is_answer].format(said) for is_answer, said in turns)
    read = [(message["role"], message["content"]) for message in read_transcript(written, "chat")]
    assert read == [("assistant" if is_answer else "user", said) for is_answer, said in turns]


def test_functions_of_glaive_are_tools_and_calls(chatml_tokenizer_folder: Path) -> None:
    conversation = normalized({"system": SYSTEM, "chat": CHAT}, "transcript")
    meant: list[dict[str, Any]] = [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": "Is it free on Monday?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"slot": "nine"}'},
        {"role": "assistant", "content": "At nine.\n\nOr ten."},
    ]
    assert conversation.messages == tuple(meant)
    assert conversation.tools == (TOOL, TOOL)
    encoder = Encoder.from_config(EncodeConfig(tokenizer=str(chatml_tokenizer_folder)))
    require_served(encoder, conversation, meant, [TOOL, TOOL])


def test_what_is_announced_otherwise_stays_in_the_system_text() -> None:
    chat = "USER: Hi\n\n\nASSISTANT: Yes <|endoftext|>"
    for text in ("You help.", SYSTEM.removeprefix("SYSTEM: ").strip() + " And be kind."):
        conversation = normalized({"system": f"SYSTEM: {text}", "chat": chat}, "transcript")
        assert conversation.messages[0]["content"] == text
        assert conversation.tools is None

    own = normalized({"system": SYSTEM, "chat": chat, "tools": [TOOL]}, "transcript")
    assert len(own.tools or ()) == 1
    assert "get_slot" in own.messages[0]["content"]


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ("Once upon a time. USER: Hi", "no_messages"),
        ("", "no_messages"),
        (["USER: Hi"], "no_messages"),
        ("USER: Hi", "nothing_to_train"),
        ('USER: Hi\n\n\nASSISTANT: <functioncall> {"name": "f", "argu', "bad_tool_call"),
        ("USER: Hi\n\n\nASSISTANT: <functioncall> [1]", "bad_tool_call"),
        (
            'USER: Hi\n\n\nASSISTANT: <functioncall> {"name": "f", "arguments": \'{cut\'}',
            "bad_tool_call",
        ),
    ],
)
def test_what_is_no_transcript_is_dropped(chat: Any, reason: str) -> None:
    found, detail = rejected({"chat": chat}, "transcript")
    assert found == reason
    assert "upon" not in detail


def test_a_transcript_in_a_named_column() -> None:
    row = {"text": "### Human: Hi### Assistant: Yes"}
    assert texts(normalized(row, "transcript", transcript="text")) == [
        ("user", "Hi"),
        ("assistant", "Yes"),
    ]
