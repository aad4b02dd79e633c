"""The rule for the mask, on tokens written by hand."""

import numpy as np
import pytest

from miles.data.encoding.loss_mask import decide_loss_mask, mark_points, select_turns
from miles.data.template.render import Span
from miles.data.tokens.text_encoder import Tokens
from miles.data.types import Conversation, RowRejected

HEADER, ANSWER, END, NEWLINE = range(1, 5)
TWO_TURNS = [HEADER, ANSWER, ANSWER, END, NEWLINE, HEADER, ANSWER, END, NEWLINE]


def conversation(*flags: bool | None) -> Conversation:
    """Each flag is one question and its answer; the flag is the answer's."""
    messages = []
    message_flags: list[bool | None] = []
    for flag in flags:
        messages += [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        message_flags += [None, flag]
    return Conversation(tuple(messages), None, tuple(message_flags))


def tokens(ids: list[int], first: list[int], straddled: list[bool] | None = None) -> Tokens:
    return Tokens(np.array(ids, np.int32), first, straddled or [False] * len(first))


@pytest.mark.parametrize(
    ("turns", "selected"),
    [
        ("all", [True, False, True]),
        ("last", [False, False, True]),
        ("flags", [True, False, False]),
    ],
)
def test_turns_are_selected_by_setting_and_flag(turns: str, selected: list[bool]) -> None:
    assert select_turns(conversation(True, False, None), turns) == selected


def test_an_excluded_last_turn_selects_no_other() -> None:
    assert select_turns(conversation(True, False), "last") == [False, False]


def test_points_are_where_training_and_terminator_begin() -> None:
    spans = [Span(start=10, answer=15, end=20), Span(start=30, answer=30, end=40)]
    assert mark_points(spans, "<end>", "mask") == [15, 15, 30, 35]
    assert mark_points(spans, "<end>", "train") == [10, 15, 30, 35]


def test_answer_and_terminator_are_trained() -> None:
    mask, num_straddling = decide_loss_mask(
        tokens(TWO_TURNS, first=[1, 3, 6, 7]), [True, True], [END]
    )
    assert mask.dtype == np.uint8
    assert mask.tolist() == [0, 1, 1, 1, 0, 0, 1, 1, 0]
    assert num_straddling == 0


def test_a_turn_that_is_not_selected_is_masked() -> None:
    mask, _ = decide_loss_mask(tokens(TWO_TURNS, first=[1, 3, 6, 7]), [False, True], [END])
    assert mask.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 0]


def test_a_terminator_of_two_tokens_is_trained_whole() -> None:
    ids = [HEADER, ANSWER, END, END, NEWLINE]
    mask, _ = decide_loss_mask(tokens(ids, first=[1, 2]), [True], [END, END])
    assert mask.tolist() == [0, 1, 1, 1, 0]


def test_straddling_tokens_are_counted_in_selected_turns() -> None:
    straddling = tokens(TWO_TURNS, [2, 3, 6, 7], [True, False, False, False])
    mask, num_straddling = decide_loss_mask(straddling, [True, True], [END])
    assert mask.tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 0]
    assert num_straddling == 1
    assert decide_loss_mask(straddling, [False, True], [END])[1] == 0


@pytest.mark.parametrize(
    "merged",
    [
        tokens([HEADER, ANSWER, NEWLINE], [1, 2]),
        tokens([HEADER, ANSWER, END], [1, 2], [False, True]),
    ],
)
def test_a_merged_terminator_is_unlocatable(merged: Tokens) -> None:
    with pytest.raises(RowRejected, match="turn 0 does not end in tokens of its own"):
        decide_loss_mask(merged, [True], [END])
