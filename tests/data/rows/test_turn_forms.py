"""Lists of turns in every form that people have."""

from __future__ import annotations

import json
from typing import Any

import pytest

from miles.data.config import RowFormat
from miles.data.types import Conversation
from tests.support.raw_rows import normalized, rejected, texts
from tests.support.row_cases import take

TWO = [("user", "2+2?"), ("assistant", "4")]
FOUR = [*TWO, ("user", "3+3?"), ("assistant", "6")]


def read(turns: Any, **roles: str) -> Conversation:
    return normalized({"messages": turns}, roles=roles)


@pytest.mark.parametrize(
    "turns",
    [
        ["2+2?", "4", "3+3?", "6"],
        [["2+2?", "4"], ["3+3?", "6"]],
        [{"input": "2+2?", "output": "4"}, {"input": "3+3?", "output": "6"}],
        [{"user": "2+2?", "assistant": "4"}, {"Assistant": "6", "Human": "3+3?"}],
        [json.dumps({"role": role, "content": text}) for role, text in FOUR],
        [{"speaker": role, "text": text} for role, text in FOUR],
        [{"role": role.upper(), "value": text} for role, text in FOUR],
        [{"from": role, "text": text, "role": None, "content": None} for role, text in FOUR],
    ],
)
def test_every_form_of_turns(turns: Any) -> None:
    conversation = read(turns)
    assert texts(conversation) == FOUR
    assert conversation.flags == (None,) * 4
    assert texts(read(json.dumps(turns))) == FOUR


def test_pairs_have_a_system_turn_flags_and_further_keys() -> None:
    turn = {"assistant": "4", "system": "Add.", "user": "2+2?", "weight": 0, "note": "n"}
    conversation = read([turn, {"input": "3+3?", "output": "6"}])
    assert texts(conversation) == [("system", "Add."), *FOUR]
    assert conversation.flags == (None, None, False, None, None)
    assert conversation.messages[2]["note"] == "n"
    assert texts(read([{"Human": "2+2?", "MOSS": "4"}], MOSS="assistant")) == TWO


def test_texts_that_are_no_turns_are_not_taken_for_json() -> None:
    assert texts(read(["{", "4"])) == [("user", "{"), ("assistant", "4")]
    assert texts(read(['{"a": 1}', "4"])) == [("user", '{"a": 1}'), ("assistant", "4")]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (["2+2?", {"role": "assistant", "content": "4"}], "bad_message"),
        ([["2+2?", "4"], "3+3?"], "bad_message"),
        ([["2+2?", None]], "bad_message"),
        ([["2+2?"]], "bad_message"),
        ([{"role": "user", "content": "2+2?"}, "4"], "bad_message"),
        ([{"input": "2+2?", "output": None}], "bad_message"),
        ([{"user": "2+2?"}], "unknown_role"),
        ([{"MOSS": "4", "Human": "2+2?"}], "unknown_role"),
    ],
)
def test_other_lists_drop_the_row(turns: Any, reason: str) -> None:
    assert rejected({"messages": turns})[0] == reason


@pytest.mark.parametrize(
    "turns",
    [
        [["user", "2+2?"], ["assistant", "4"]],
        [["HUMAN", "2+2?"], ["ai", [{"type": "text", "text": "4"}]]],
        [["Guest", "2+2?"], ["Ai", "4"]],
        ["user", "2+2?", "assistant", "4"],
        ["User: 2+2?", "Assistant:4"],
        ["guest:\n2+2?", "AI: 4"],
        [["Human: 2+2?", "Assistant: 4"]],
    ],
)
def test_names_of_roles_beside_what_is_said(turns: Any) -> None:
    """A role's name is neither what the user says nor trained."""
    assert texts(read(turns, guest="user")) == TWO
    assert texts(read(json.dumps(turns), guest="user")) == TWO


def test_roles_beside_what_is_said_come_in_any_order() -> None:
    turns = [["system", "Add."], ["human", "2+2?"], ["ai", "4"]]
    assert texts(read(turns)) == [("system", "Add."), *TWO]
    said = ["System: Add.", "Human: 2+2?", "AI: 4"]
    assert texts(read(said)) == [("system", "Add."), *TWO]
    assert texts(read(["Model: X5", "4"])) == [("user", "Model: X5"), ("assistant", "4")]


@pytest.mark.parametrize(
    ("turns", "detail"),
    [
        ([["user", "2+2?"], ["npc", "4"]], "1 of 2"),
        (["user", "2+2?", "npc", "4"], "1 of 2"),
        (["user", "2+2?", "assistant"], "2 of 2"),
        (["2+2?", "Assistant: 4"], "turn 1 begins"),
        ([["2+2?", "<|assistant|>4"]], "turn 1 begins"),
        (["<|im_start|>user\n2+2?", "4"], "turn 0 begins"),
        (["You add.", "2+2?", "4"], "3 texts without roles"),
    ],
)
def test_texts_that_may_be_roles_drop_the_row(turns: Any, detail: str) -> None:
    reason, told = rejected({"messages": turns})
    assert reason == "bad_message"
    assert detail in told


def test_answers_in_a_list_are_no_turns() -> None:
    """`completion` holds other answers to the question then, as evaluation sets have them."""
    row = {"prompt": "2+2?", "completion": ["4", "four"]}
    assert rejected(row, "prompt_completion")[0] == "bad_message"


def test_a_second_role_or_content_is_not_lost() -> None:
    turn = {"role": "assistant", "from": "gpt", "content": "4", "value": "4", "speaker": "Ann"}
    asked = {"role": "user", "content": "2+2?", "text": "two and two"}
    assert read([asked, turn]).messages == (
        {"role": "user", "content": "2+2?", "text": "two and two"},
        {"role": "assistant", "content": "4", "speaker": "Ann"},
    )


def test_cases_of_turns() -> None:
    messages = RowFormat("messages", {"messages": "data"})
    bird = [("user", "Which bird?"), ("assistant", "A lark.")]
    again = [("user", "And?"), ("assistant", "A wren.")]
    assert take("shapes/ultrachat.jsonl", messages).turns() == [*bird, *again]
    assert take("shapes/capybara.jsonl").turns() == [*bird, *again]
    assert take("shapes/turn_text.jsonl").turns() == [("user", "Hi"), ("assistant", "Hello")]
    lima = take("shapes/lima.jsonl")
    assert lima.turns(1) == [("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D")]

    odd = take("odd-order/odd_order.jsonl")
    assert odd.turns(0) == [
        ("assistant", "Welcome."),
        ("user", "Hi"),
        ("user", "there"),
        ("assistant", "Hello"),
        ("assistant", "again"),
    ]
    assert odd.turns(1)[0] == ("system", "")
    assert odd.reasons == [None, None, "bad_message", "no_messages"]
