"""The tools of a row, in every form that people have, and none where the row has none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from miles.data.config import EncodeConfig
from miles.data.encoding.encoder import Encoder
from tests.support.raw_rows import ANSWER, ASK, normalized, rejected
from tests.support.row_cases import require_served, take

ROW = {"conversations": [ASK, ANSWER]}
FLAT = {"name": "f", "parameters": {"default": None}}
TOOL = {"type": "function", "function": FLAT}


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],  # with the null that its author wrote
        TOOL,
        json.dumps([TOOL]),
        json.dumps(TOOL),
        json.dumps(json.dumps([TOOL])),  # encoded twice
        [json.dumps(TOOL)],
        json.dumps([json.dumps(TOOL)]),
        [{"type": "function", "function": FLAT | {"parameters": '{"default": null}'}}],
    ],
)
def test_every_form_of_tools(tools: Any) -> None:
    assert normalized(ROW | {"tools": tools}).tools == (TOOL,)
    assert normalized(ROW | {"available_tools": tools, "tools": []}).tools == (TOOL,)
    assert normalized(ROW | {"box": tools}, tools="box").tools == (TOOL,)
    for other in ({"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"}):
        shape = "alpaca" if "output" in other else "prompt_completion"
        assert normalized(other | {"tools": tools}, shape).tools == (TOOL,)


def test_forms_of_other_makers() -> None:
    for functions in ([FLAT], json.dumps([FLAT]), [TOOL]):
        assert normalized(ROW | {"functions": functions}).tools == (TOOL,)
    anthropic = {"name": "f", "type": "custom", "input_schema": {"default": None}}
    assert normalized(ROW | {"tools": json.dumps([anthropic])}).tools == (TOOL,)
    assert normalized(ROW | {"tools": [{"name": "f"}]}).tools == ({"name": "f"},)


@pytest.mark.parametrize("nothing", [None, "", " ", "None", "none", "null", [], "[]", '"None"'])
def test_no_tools(nothing: Any) -> None:
    assert normalized(ROW | {"tools": nothing}).tools is None
    assert normalized(ROW | {"tools": nothing, "functions": [FLAT]}).tools == (TOOL,)


def test_tools_within_metadata() -> None:
    for metadata in ({"tools": [TOOL]}, {"tools": json.dumps([TOOL]), "n": 1}):
        for column in (metadata, json.dumps(metadata)):
            assert normalized(ROW | {"metadata": column}).tools == (TOOL,)
            assert normalized(ROW | {"metadata": column}, tools="box").tools is None
    for other in ("tools", "{", {"tools": ["hammer"]}, {"tools": "hammer"}, {"tools": 3}, 3, [1]):
        assert normalized(ROW | {"metadata": other}).tools is None
    assert rejected(ROW | {"metadata": '{"tools": ['})[0] == "malformed_json"


def test_what_is_no_tools_drops_the_row() -> None:
    assert rejected(ROW | {"tools": "[{"})[0] == "malformed_json"
    for no_list in ({"a": 1}, '{"a": 1}', "0", 0, "false", [3]):
        assert rejected(ROW | {"tools": no_list})[0] == "bad_message"
    bad_schema = [{"function": FLAT | {"parameters": "{"}}]
    assert rejected(ROW | {"tools": bad_schema})[0] == "malformed_json"


def test_tools_that_the_system_turn_shows_are_not_given_again() -> None:
    for text, tools in (
        ("Call: <tools></tools> <tools> [..] </tools>", None),
        ("Call within <tools></tools>.", (TOOL,)),
        ("They stand in <tools>a list</tools>.", (TOOL,)),
        ("They are <tools>\nf(x)</tools>.", None),
        ("Call <tools> that", (TOOL,)),
    ):
        turns = [{"from": "system", "value": text}, ASK, ANSWER]
        assert normalized({"conversations": turns, "tools": [json.dumps(TOOL)]}).tools == tools
    shown = "<tools> [..] </tools>"
    by_column = ROW | {"tools": [json.dumps(TOOL)], "system": shown}
    assert normalized(by_column).tools is None


SLOT = {
    "name": "get_slot",
    "description": "Finds a slot.",
    "parameters": {"type": "object", "properties": {"day": {"type": "string"}}},
}
SLOT_TOOL = {"type": "function", "function": SLOT}


def slot_call(day: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "get_slot", "arguments": {"day": day}}}


SLOT_CALL = slot_call("Monday")


@pytest.fixture(scope="module")
def encoder(chatml_tokenizer_folder: Path) -> Encoder:
    return Encoder.from_config(EncodeConfig(tokenizer=str(chatml_tokenizer_folder)))


def called(text: str, *calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "tool_calls": list(calls)}


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


GREETING = [said("user", "Hi"), said("assistant", "Hello")]
SLOT_ASKED = said("user", "Slot?")
BOOKED = [said("tool", "nine"), said("assistant", "You are booked at nine.")]
HERMES_CALL = '<tool_call>\n{"name": "get_slot", "arguments": {"day": "Monday"}}\n</tool_call>\n'


@pytest.mark.parametrize(
    ("case", "messages", "tools"),
    [
        ("shapes/tools_None.jsonl", GREETING, None),
        ("shapes/tools_object.jsonl", GREETING, [SLOT_TOOL]),
        ("shapes/nemotron_metadata_tools.jsonl", [SLOT_ASKED, called("", SLOT_CALL)], [SLOT_TOOL]),
        (
            "legacy-function-call/qwen_agent.jsonl",
            [
                said("user", "Book me in."),
                called("", SLOT_CALL),
                said("tool", '{"slot": "nine"}'),
                BOOKED[1],
            ],
            [SLOT_TOOL],
        ),
        (
            "legacy-function-call/with_text.jsonl",
            [said("user", "Book me in."), called("I shall look.", SLOT_CALL), *BOOKED],
            [SLOT_TOOL],
        ),
        (
            "ms-swift-agent/swift.jsonl",
            [
                said("user", "Book me in."),
                called("", SLOT_CALL),
                BOOKED[0],
                said("assistant", "At nine."),
            ],
            [SLOT_TOOL],
        ),
        (
            "shapes/hermes.jsonl",
            [
                said("system", "You call functions. <tools> [..] </tools>"),
                SLOT_ASKED,
                said("assistant", HERMES_CALL),
                said("tool", '{"slot": "nine"}'),
                said("assistant", "Nine."),
            ],
            None,
        ),
        (
            "shapes/anthropic.jsonl",
            [SLOT_ASKED, called("Looking.", SLOT_CALL), BOOKED[0], said("assistant", "Nine.")],
            None,
        ),
        (
            "nulls/meant.jsonl",
            [
                said("user", "Hot?"),
                called(
                    "",
                    {
                        "type": "function",
                        "function": {"name": "f", "arguments": {"city": "Ulm", "unit": None}},
                    },
                ),
                said("tool", "mild"),
                said("assistant", "Mild."),
            ],
            [
                {
                    "type": "function",
                    "function": {
                        "name": "f",
                        "description": "d",
                        "parameters": {
                            "type": "object",
                            "properties": {"unit": {"type": ["string", "null"], "default": None}},
                        },
                    },
                }
            ],
        ),
        (
            "parallel-tool-results/parallel.jsonl",
            [
                said("user", "Both files?"),
                called("", slot_call("1"), slot_call("2")),
                said("tool", "one"),
                said("tool", "two"),
                said("assistant", "One and two."),
            ],
            [SLOT_TOOL],
        ),
        (
            "list-arguments/list_args.parquet",
            [
                said("user", "Find it."),
                called(
                    "",
                    {
                        "type": "function",
                        "function": {"name": "search", "arguments": {"entities": ["Ulm", "Bonn"]}},
                    },
                ),
                said("tool", "two"),
                said("assistant", "Two."),
            ],
            None,
        ),
        *(
            (
                f"tool-arguments/{name}.jsonl",
                [
                    said("user", "What time is it?"),
                    called(
                        "",
                        {"type": "function", "function": {"name": "get_slot", "arguments": {}}},
                    ),
                    said("tool", "noon"),
                    said("assistant", "Noon."),
                ],
                [SLOT_TOOL],
            )
            for name in ("empty", "blank", "object_text")
        ),
        (
            "content-null/content.jsonl",
            [SLOT_ASKED, called("", SLOT_CALL), BOOKED[0], said("assistant", "Nine.")],
            [SLOT_TOOL],
        ),
    ],
)
def test_cases_with_tools_become_what_is_served(
    encoder: Encoder, case: str, messages: Any, tools: Any
) -> None:
    for conversation in take(case).conversations:
        require_served(encoder, conversation, messages, tools)


@pytest.mark.parametrize(
    "case",
    ["tool-arguments/list_text", "tool-arguments-2/python_dict", "tool-arguments-2/cut"],
)
def test_cases_with_arguments_that_are_no_object(case: str) -> None:
    assert take(f"{case}.jsonl").reasons == ["bad_tool_call"] * 3


def test_what_hermes_writes_stands_there_once(encoder: Encoder) -> None:
    (conversation, *_) = take("shapes/hermes.jsonl").conversations
    ids = encoder.encode(conversation).input_ids
    text = encoder.tokenizer.decode(ids)
    assert text.count("get_slot") == 1  # in the call; the case's system turn abbreviates its tools
    for mark in ("<tools>", "<tool_call>", "<tool_response>"):
        assert text.count(mark) == 1


def test_a_turn_with_its_call_is_trained_as_it_is_served(encoder: Encoder) -> None:
    """A text and the calls after it are one turn in ms-swift's rows, as are several calls."""
    call = json.dumps(slot_call("Monday")["function"])
    turns = [
        SLOT_ASKED,
        said("assistant", "Looking."),
        said("tool_call", call),
        said("tool_call", f"[{call}, {call}]"),
        said("tool_response", "nine"),
        said("tool_response", "ten"),
        said("assistant", "Nine."),
    ]
    conversation = normalized({"messages": turns, "tools": [SLOT_TOOL]})
    served = [
        SLOT_ASKED,
        called("Looking.", SLOT_CALL, SLOT_CALL, SLOT_CALL),
        said("tool", "nine"),
        said("tool", "ten"),
        said("assistant", "Nine."),
    ]
    encoded = require_served(encoder, conversation, served, [SLOT_TOOL])
    trained = encoder.tokenizer.decode(encoded.input_ids[encoded.loss_mask == 1])
    assert trained.count("<tool_call>") == 3

    for flags, flag in (((0, 0), False), ((1, 1), True)):
        flagged = [{**turns[1], "loss": flags[0]}, {**turns[2], "loss": flags[1]}]
        assert normalized({"messages": [SLOT_ASKED, *flagged, turns[-1]]}).flags[1] is flag
    flagged = [{**turns[1], "loss": 0}, {**turns[2], "loss": 1}]
    assert rejected({"messages": [SLOT_ASKED, *flagged, turns[-1]]})[0] == "partial_turn"
    thoughts = [{**turns[1], "reasoning_content": "a"}, {**turns[2], "reasoning_content": "b"}]
    assert rejected({"messages": [SLOT_ASKED, *thoughts, turns[-1]]})[0] == "bad_message"
    thoughts = [{**turns[1], "id": 1}, {**turns[2], "reasoning_content": "b", "id": 2}]
    message = normalized({"messages": [SLOT_ASKED, *thoughts, turns[-1]]}).messages[1]
    assert (message["reasoning_content"], message["id"]) == ("b", 1)
