"""Every shape of row that is understood, and every reason for which one is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.data.config import ROLE_NAMES, ROW_FIELDS, RowFormat, SourceConfig
from miles.data.files.manifest import build_manifest
from miles.data.files.read import read_rows
from miles.data.files.row_shapes import USUAL_PAIRS
from miles.data.rows.normalize import normalize
from miles.data.rows.turns import TRAIN_FLAGS
from miles.data.types import Conversation, RowRejected

ASK = {"from": "human", "value": "2+2?"}
ANSWER = {"from": "gpt", "value": "4"}


def of(
    row: Any, shape: str = "messages", /, roles: dict[str, str] | None = None, **columns: str
) -> Conversation:
    return normalize(json.dumps(row).encode(), RowFormat(shape, columns, roles or {}))


def rejected(row: Any, shape: str = "messages", /, **columns: str) -> tuple[str, str]:
    payload = row if isinstance(row, bytes) else json.dumps(row).encode()
    with pytest.raises(RowRejected) as caught:
        normalize(payload, RowFormat(shape, columns))
    return caught.value.reason, caught.value.detail


def texts(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in conversation.messages]


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
    assert conversation.flags == (None, None, None)
    assert conversation.text is None
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
    assert conversation.flags == (None, None, None)


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
    conversation = of(row)
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
        conversation = of({"conversations": turns})
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


@pytest.mark.parametrize("key", TRAIN_FLAGS)
def test_a_row_says_which_turns_are_trained(key: str) -> None:
    for off in (0, 0.0, False):
        turns = [
            {**ASK, key: 1},
            {**ANSWER, key: off},
            ASK,
            {**ANSWER, key: 1},
            {**ANSWER, key: None},
        ]
        conversation = of({"conversations": turns})
        assert conversation.flags == (None, False, None, True, None)  # a user's says nothing
        assert key not in conversation.messages[1]
        assert rejected({"conversations": [ASK, {**ANSWER, key: off}]})[0] == "nothing_to_train"
    assert rejected({"conversations": [ASK, {**ANSWER, key: "0"}]})[0] == "bad_message"
    call = {"from": "function_call", "value": '{"name": "f"}', key: False}
    assert of({"conversations": [ASK, call, ANSWER]}).flags == (None, False, None)


@given(
    st.dictionaries(
        st.sampled_from(TRAIN_FLAGS), st.sampled_from([None, 0, 1, 2, 0.5, True, False])
    )
)
def test_of_several_flags_a_false_one_wins(flags: dict[str, Any]) -> None:
    said = [bool(value) for value in flags.values() if value is not None]
    conversation = of({"conversations": [ASK, {**ANSWER, **flags}, ASK, ANSWER]})
    assert conversation.flags[1] is (all(said) if said else None)


def test_nan_is_as_null() -> None:
    row = b'{"messages": [{"role": "assistant", "content": "4", "weight": NaN, "x": -Infinity}], "score": NaN}'
    conversation = normalize(row)
    assert (conversation.messages, conversation.flags) == (
        ({"role": "assistant", "content": "4"},),
        (None,),
    )


def test_tools_as_text_or_list() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    row = {"conversations": [ASK, ANSWER]}
    without_nulls = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert of(row | {"tools": json.dumps([tool])}).tools == (tool,)  # its author's text
    assert of(row | {"tools": [json.dumps(tool)]}).tools == (tool,)
    assert of(row | {"tools": [tool]}).tools == (without_nulls,)  # Parquet's nulls
    assert of(row | {"functions": [without_nulls]}, tools="functions").tools == (without_nulls,)
    for nothing in (None, "", " ", [], "[]"):
        assert of(row | {"tools": nothing}).tools is None
    assert rejected(row | {"tools": "[{"})[0] == "malformed_json"
    for no_list in ({"a": 1}, '{"a": 1}', "0", 0, "false"):
        assert rejected(row | {"tools": no_list})[0] == "bad_message"
    assert rejected(row | {"tools": [3]})[0] == "bad_message"
    for other in ({"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"}):
        shape = "alpaca" if "output" in other else "prompt_completion"
        assert of(other | {"tools": json.dumps([tool])}, shape).tools == (tool,)


def test_the_column_of_the_conversation() -> None:
    turns = [ASK, ANSWER]
    assert len(of({"messages": None, "conversations": turns}).messages) == 2
    assert len(of({"chat": turns, "messages": []}, messages="chat").messages) == 2
    assert len(of({"messages": json.dumps(turns)}).messages) == 2
    assert (
        len(of({"messages": [ASK], "conversations": turns}, messages="conversations").messages) == 2
    )
    assert rejected({"messages": turns}, messages="chat")[0] == "no_messages"


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
def test_arguments_are_the_object_that_their_text_spells(text: Any, arguments: Any) -> None:
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
        (read,) = of(row).messages[1]["tool_calls"]
        assert read.get("function", read) == {"name": "f", "arguments": arguments}
        assert list(read) in (
            ["type", "function"],
            ["name", "arguments"],
        )  # a template may write it as JSON


def test_further_keys_as_json_text() -> None:
    def message(**keys: Any) -> Any:
        return of({"messages": [{"role": "assistant", "content": "4", **keys}]}).messages[0]

    plain = {"role": "assistant", "content": "4"}
    assert message(extra='{"thinking": {"a": null}, "role": "user"}') == plain | {
        "thinking": {"a": None}
    }
    assert message(extra='{"tool_calls": [{"name": "f"}]}')["tool_calls"] == [
        {"name": "f", "arguments": {}}
    ]
    for own in ("text", "[1]", {"a": 1}):
        assert message(extra=own) == plain | {"extra": own}


def test_role_names() -> None:
    row = {"messages": [{"role": "Bot", "content": "a"}, {"role": "model", "content": "b"}, ANSWER]}
    assert rejected(row)[0] == "unknown_role"
    conversation = of(row, roles={"Bot": "assistant", "model": "user"})
    assert [message["role"] for message in conversation.messages] == [
        "assistant",
        "user",
        "assistant",
    ]
    for role in ROLE_NAMES:
        row = {"messages": [{"role": "x", "content": "a"}, ANSWER]}
        assert of(row, roles={"x": role}).messages[0] == {"role": role, "content": "a"}


@pytest.mark.parametrize(
    ("instruction", "given", "question"),
    [
        ("Add.", "2 2", "Add.\n2 2"),
        ("Add.", "", "Add."),
        ("Add.", None, "Add."),
        (None, "2+2?", "2+2?"),
    ],
)
def test_alpaca(instruction: str | None, given: str | None, question: str) -> None:
    row = {"instruction": instruction, "input": given, "output": "4", "text": "### Instruction …"}
    assert texts(of(row, "alpaca")) == [("user", question), ("assistant", "4")]


def test_alpaca_history_and_system() -> None:
    row = {"instruction": "And 3+3?", "response": "6", "context": None, "system": "Be brief."}
    asked = [("user", "And 3+3?"), ("assistant", "6")]
    for nothing in (None, [], "", "[]"):
        assert texts(of(row | {"history": nothing}, "alpaca")) == [("system", "Be brief."), *asked]
    conversation = of(row | {"history": [["2+2?", "4"]]}, "alpaca")
    assert texts(conversation) == [
        ("system", "Be brief."),
        ("user", "2+2?"),
        ("assistant", "4"),
        *asked,
    ]
    assert conversation.flags == (None,) * 5
    named = of({"q": "2+2?", "a": "4"}, "alpaca", instruction="q", output="a")
    assert texts(named) == [("user", "2+2?"), ("assistant", "4")]


@pytest.mark.parametrize("pair", USUAL_PAIRS)
def test_prompt_and_completion(pair: tuple[str, str]) -> None:
    conversation = of({pair[0]: "2+2?", pair[1]: "4", "system": "Be brief."}, "prompt_completion")
    assert texts(conversation) == [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4")]
    assert conversation.flags == (None, None, None)


def test_of_two_lists_only_the_completion_is_trained() -> None:
    prompt = [{"role": "system", "content": "s"}, ASK, ANSWER, {**ANSWER, "weight": 1}, ASK]
    completion = [ANSWER, ASK, {**ANSWER, "weight": 0}, {**ANSWER, "weight": 1}]
    conversation = of({"prompt": prompt, "completion": completion}, "prompt_completion")
    assert [message["role"] for message in conversation.messages] == [
        *(
            "system",
            "user",
            "assistant",
            "assistant",
            "user",
            "assistant",
            "user",
            "assistant",
            "assistant",
        )
    ]
    assert conversation.flags == (None, None, False, False, None, None, None, False, True)
    assert texts(of({"prompt": [ASK], "completion": "4"}, "prompt_completion")) == [
        ("user", "2+2?"),
        ("assistant", "4"),
    ]
    assert (
        rejected({"prompt": [ASK, ANSWER], "completion": [ASK]}, "prompt_completion")[0]
        == "nothing_to_train"
    )
    detail = rejected(
        {"prompt": [ASK], "completion": [ANSWER, {"role": "x"}]}, "prompt_completion"
    )[1]
    assert detail.startswith("column completion, turn 1: ")


def test_a_named_column_is_the_only_one_for_its_field() -> None:
    row = {
        "question": "2+2?",
        "answer": "4",
        "prompt": "no",
        "completion": "no",
        "body": "b",
        "text": "no",
    }
    named = of(row, "prompt_completion", prompt="question", completion="answer")
    assert texts(named) == [("user", "2+2?"), ("assistant", "4")]
    assert texts(of(row, "prompt_completion", prompt="question"))[1] == (
        "assistant",
        "no",
    )  # the usual one
    assert of(row, "text", text="body").text == "b"
    for shape, columns in (
        ("text", {"text": "gone"}),
        ("messages", {"messages": "gone"}),
        ("alpaca", {"output": "gone"}),
        ("prompt_completion", {"completion": "gone"}),
    ):
        reason, detail = rejected(
            row | {"messages": [ANSWER], "instruction": "i", "output": "o"}, shape, **columns
        )
        assert reason == "no_messages"
        assert "gone" in detail


def test_plain_text() -> None:
    assert of({"text": " a\n", "messages": None}, "text") == Conversation((), None, (), " a\n")


def test_a_byte_order_mark_is_no_part_of_a_row() -> None:
    assert (
        len(
            normalize(
                b"\xef\xbb\xbf" + json.dumps({"conversations": [ASK, ANSWER]}).encode()
            ).messages
        )
        == 2
    )


def test_a_shape_is_found_before_rows_are_read() -> None:
    with pytest.raises(AssertionError):
        normalize(b"{}", RowFormat())


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
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "text": SECRET}]}]},
            "bad_message",
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
        ({"conversations": [{"from": SECRET, "value": ""}]}, "unknown_role"),
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
        ("alpaca", {"instruction": SECRET, "output": 4}, "bad_message"),
        ("alpaca", {"instruction": [SECRET], "output": "4"}, "bad_message"),
        ("alpaca", {"instruction": SECRET, "input": 4, "output": "4"}, "bad_message"),
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
        ("prompt_completion", {"prompt": SECRET, "completion": 4}, "bad_message"),
        ("prompt_completion", {"prompt": {"a": SECRET}, "completion": "4"}, "bad_message"),
        ("prompt_completion", {"prompt": [SECRET], "completion": "4"}, "bad_message"),
        (
            "prompt_completion",
            {"prompt": [{"role": SECRET, "content": ""}], "completion": "4"},
            "unknown_role",
        ),
        ("text", {"text": None, "a": SECRET}, "no_messages"),
        ("text", {SECRET: 1}, "no_messages"),
        ("text", {"text": [SECRET]}, "bad_message"),
        ("text", {"text": 4, "a": SECRET}, "bad_message"),
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


def test_characters_beyond_the_basic_plane_are_text() -> None:
    assert (
        of({"conversations": [ASK, {"from": "gpt", "value": "😀 \\ud800"}]}).messages[1]["content"]
        == "😀 \\ud800"
    )


KEYS = (
    *(
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
        "extra",
    ),
    *(
        "instruction",
        "input",
        "output",
        "history",
        "system",
        "prompt",
        "completion",
        "name",
        "arguments",
        "function",
    ),
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["gpt", "user", "{}", "[1]"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
    ),
    max_leaves=25,
)


@settings(max_examples=500, deadline=None)
@given(json_values, st.sampled_from(list(ROW_FIELDS)))
def test_any_json_is_a_conversation_or_rejected(row: Any, shape: str) -> None:
    try:
        conversation = of(row, shape)
    except RowRejected:  # with a known reason, which its constructor asserts
        return
    assert len(conversation.messages) == len(conversation.flags)
    if shape == "text":
        assert conversation.text
        assert conversation.text.strip()
        return
    trained = [
        flag is not False for message, flag in pairs(conversation) if message["role"] == "assistant"
    ]
    assert any(trained)
    assert all(
        flag is None for message, flag in pairs(conversation) if message["role"] != "assistant"
    )
    assert all(isinstance(message["content"], str) for message in conversation.messages)
    assert {message["role"] for message in conversation.messages} <= set(ROLE_NAMES)


def pairs(conversation: Conversation) -> list[tuple[Any, bool | None]]:
    return list(zip(conversation.messages, conversation.flags, strict=True))


@pytest.mark.parametrize(
    ("name", "num_rows"), [("openhermes_sample", 16_418), ("glaive_tools_en", 300)]
)
def test_every_real_row(assets: Path, name: str, num_rows: int) -> None:
    manifest = build_manifest([SourceConfig(name, (str(assets / f"data/{name}.parquet"),))])
    conversations = [normalize(row) for row in read_rows(manifest, np.arange(num_rows))]
    assert {message["role"] for c in conversations for message in c.messages} <= {
        "system",
        "user",
        "assistant",
        "tool",
    }
    if name == "glaive_tools_en":
        assert any("tool_calls" in message for c in conversations for message in c.messages)
        assert any(c.tools for c in conversations)
