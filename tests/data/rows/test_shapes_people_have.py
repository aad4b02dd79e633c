"""Rows of popular data sets: each is read as the conversation that it means, or refused by name.

The ids are those of `apply_chat_template` on the messages that stand here, written by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from miles.data.config import EncodeConfig, RowFormat
from miles.data.encoding.encoder import Encoder
from tests.support.raw_rows import normalized, rejected, texts
from tests.support.row_cases import refusal, require_served, take


@pytest.fixture(scope="module")
def encoder(chatml_tokenizer_folder: Path) -> Encoder:
    return Encoder.from_config(EncodeConfig(tokenizer=str(chatml_tokenizer_folder)))


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


SLOT_CALL = {
    "type": "function",
    "function": {"name": "get_slot", "arguments": {"day": "Monday"}},
}
SLOT_TOOL = {
    "type": "function",
    "function": {
        "name": "get_slot",
        "description": "d",
        "parameters": {"day": {"type": "str", "description": "x", "default": ""}},
    },
}


@pytest.mark.parametrize(
    ("case", "shape", "messages"),
    [
        ("shapes/firefly", "prompt_completion", [user("天空的颜色？"), answer("蓝色。")]),
        ("shapes/flan", "prompt_completion", [user("Sky colour?"), answer("Blue.")]),
        ("shapes/problem_solution", "prompt_completion", [user("1+1"), answer("2")]),
        (
            "shapes/s1k",
            "prompt_completion",
            [user("1+1"), answer("It is 2.", reasoning_content="think")],
        ),
        (
            "shapes-2/medical_o1",
            "prompt_completion",
            [
                user("Why fever?"),
                answer("Infection.", reasoning_content="Fever follows infection."),
            ],
        ),
        (
            "shapes/nemotron_v1",
            "prompt_completion",
            [system("detailed thinking on"), user("Hi"), answer("<think>\nx\n</think>\n\nHello")],
        ),
        ("shapes-2/counsel", "prompt_completion", [user("I am sad."), answer("Tell me more.")]),
        ("shapes-2/upper", "alpaca", [user("Why fever?"), answer("Infection.")]),
        ("shapes-2/alpaca_numbers", "alpaca", [user("1+1"), answer("2")]),
        ("shapes-2/gsm_numbers", "prompt_completion", [user("1+1"), answer("2")]),
        ("shapes/glaive_v2", "transcript", [system("You help."), user("Hi"), answer("Hello")]),
        ("shapes/hh", "preference", [user("Hi"), answer("Hello")]),
        ("shapes/pref", "preference", [user("Hi"), answer("Hello")]),
        ("shapes/moss", "messages", [system("m"), user("Hi"), answer("Hello")]),
        ("shapes/slimorca", "messages", [system("s"), user("Hi"), answer("Hello")]),
    ],
)
def test_popular_rows_are_read(
    encoder: Encoder, case: str, shape: str, messages: list[dict[str, Any]]
) -> None:
    taken = take(f"{case}.jsonl")
    assert taken.shape == shape
    first = taken.conversations[0]
    assert first.messages == tuple(messages)
    assert first.tools is None
    encoded = require_served(encoder, first, messages)
    assert encoded.loss_mask.any()


def test_a_struct_of_lists_is_turns(encoder: Encoder) -> None:
    taken = take("shapes/sequence.parquet")
    for conversation in taken.conversations:
        assert conversation.messages == (user("Hi"), answer("Hello"))
        require_served(encoder, conversation, [user("Hi"), answer("Hello")])
    uneven = {"conversations": {"from": ["human", "gpt"], "value": ["Hi"]}}
    assert rejected(uneven)[0] == "bad_message"
    nulls = {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Yes"], "name": None}}
    assert normalized(nulls).messages == (user("Hi"), answer("Yes"))


def test_turns_of_moss_are_in_their_order() -> None:
    def turn(number: int, **keys: str) -> dict[str, str]:
        return {
            "Human": f"<|Human|>: ask {number}<eoh>\n",
            "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
            "Commands": "<|Commands|>: None<eoc>\n",
            "MOSS": f"<|MOSS|>: say {number}<eom>\n",
            **keys,
        }

    chat = {f"turn_{number}": turn(number) for number in (10, 2, 1)}
    said = [content for _, content in texts(normalized({"chat": chat}))]
    assert said == ["ask 1", "say 1", "ask 2", "say 2", "ask 10", "say 10"]

    plugin = {"turn_1": turn(1, Commands='<|Commands|>: Search("larch")<eoc>\n')}
    reason, detail = rejected({"chat": plugin})
    assert reason == "bad_message"
    assert "turn_1 has thoughts, commands or results" in detail


def test_calls_of_xlam_are_tool_calls(encoder: Encoder) -> None:
    taken = take("shapes/xlam.jsonl")
    assert taken.shape == "prompt_completion"
    meant = [user("Slot on Monday?"), answer("", tool_calls=[SLOT_CALL])]
    for conversation in taken.conversations:
        assert conversation.messages == tuple(meant)
        assert conversation.tools == (SLOT_TOOL,)  # as its author wrote it, in a function object
        require_served(encoder, conversation, meant, [SLOT_TOOL])

    text = {"query": "Which?", "answers": "[none of them]", "tools": json.dumps([SLOT_TOOL])}
    assert texts(normalized(text, "prompt_completion"))[1] == ("assistant", "[none of them]")


@pytest.mark.parametrize(
    ("case", "columns", "messages"),
    [
        (
            "shapes/openai_batch.jsonl",
            {"prompt": "body.messages", "completion": "response.body.choices.0.message"},
            [user("Hi"), answer("Hello")],
        ),
        (
            "shapes/verl_gsm8k.jsonl",
            {"prompt": "extra_info.question", "completion": "extra_info.answer"},
            [user("1+1?"), answer("It is #### 2")],
        ),
        (
            "shapes-2/advert.jsonl",
            {"prompt": "content", "completion": "summary"},
            [user("type#dress"), answer("A dress.")],
        ),
    ],
)
def test_the_flag_that_a_refusal_names_reads_the_rows(
    encoder: Encoder, case: str, columns: dict[str, str], messages: list[dict[str, Any]]
) -> None:
    message = refusal(case)
    assert case in message
    assert f"--column-names '{json.dumps(columns)}'" in message
    first = take(case, RowFormat(columns=columns)).conversations[0]
    assert first.messages == tuple(messages)
    require_served(encoder, first, messages)


def test_what_gemini_is_tuned_on_is_read(tmp_path: Path) -> None:
    instruction = {"role": "system", "parts": [{"text": "Be brief."}]}
    row = {
        "systemInstruction": instruction,
        "contents": [
            {"role": "user", "parts": [{"text": "2+"}, {"text": "2?"}]},
            {"role": "model", "parts": [{"text": "4"}]},
        ],
    }
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    turns = [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4")]
    assert take(file).turns() == turns

    file.write_text(json.dumps(row | {"systemInstruction": [{"text": "Be brief."}]}))
    assert take(file).turns() == turns
    call = {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {}}}]}
    file.write_text(json.dumps({"contents": [*row["contents"], call]}))
    assert take(file).reasons == ["bad_message"]


def test_a_preferred_answer_is_not_proposed_without_its_question(tmp_path: Path) -> None:
    row = {
        "input": {"messages": [user("2+2?")], "tools": []},
        "preferred_output": [answer("4")],
        "non_preferred_output": [answer("5")],
    }
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    columns = {"prompt": "input.messages", "completion": "preferred_output"}
    assert f"--column-names '{json.dumps(columns)}'" in refusal(file)
    taken = take(file, RowFormat(columns=columns))
    assert taken.turns() == [("user", "2+2?"), ("assistant", "4")]


def test_a_ranking_is_read_by_the_flags_of_its_refusal(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "2+2?"}]
    sides = {"chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"conversations": turns, **sides}))
    assert "--row-shape preference" in refusal(file)
    taken = take(file, RowFormat("preference", {"prompt": "conversations"}))
    assert taken.turns() == [("user", "2+2?"), ("assistant", "4")]


@pytest.mark.parametrize("field", ["tools", "system"])
def test_a_named_column_that_no_row_has_is_refused(tmp_path: Path, field: str) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"prompt": "2+2?", "completion": "4", "apis": None}
    file.write_text(json.dumps(row))
    message = refusal(file, RowFormat(columns={field: "apiz"}))
    for part in ("column apiz", "prompt, completion, apis", "did you mean apis?"):
        assert part in message
    # A name that is there, or that is looked for anyway, is taken; so where others have it.
    for columns in ({field: "apis"}, {field: field}):
        assert take(file, RowFormat(columns=columns)).reasons == [None]
    (tmp_path / "more.jsonl").write_text(json.dumps(row | {"apiz": ""}))
    assert take(tmp_path, RowFormat(columns={field: "apiz"})).reasons == [None, None]
    assert take(file, RowFormat(columns={field: "apiz"}), is_evaluation=True).reasons == [None]


def test_questions_without_answers_are_refused() -> None:
    message = refusal("shapes/prompt_only.jsonl")
    assert "Column prompt holds questions, and no column holds their answers" in message
    assert "The first 3 rows have prompt, label" in message


def test_a_tree_of_messages_is_no_text() -> None:
    message = refusal("tree-of-messages/oasst.jsonl")
    for part in ("'assistant', 'prompter'", "message_tree_id", "cannot join rows", "oasst.jsonl"):
        assert part in message
    assert "--row-shape text" in message
    texts_alone = take("tree-of-messages/oasst.jsonl", RowFormat("text"))
    assert texts_alone.conversations[0].text == "Why is grass green?"


def test_a_python_list_is_dropped_with_the_cause() -> None:
    (reason, *_), outcomes = take("shapes-2/repr.jsonl").reasons, take("shapes-2/repr.jsonl")
    assert reason == "malformed_json"
    assert "the text of a Python list" in str(outcomes.outcomes[0])
    assert "json.dumps" in str(outcomes.outcomes[0])
