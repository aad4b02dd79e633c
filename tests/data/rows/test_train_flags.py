"""What a turn says of its own training, and the rows of which only a part would be trained."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.data.rows.train_flags import TRAIN_FLAGS
from miles.data.types import RowRejected
from tests.support.raw_rows import ANSWER, ASK, normalized, rejected
from tests.support.row_cases import take


@pytest.mark.parametrize(
    ("value", "flag"),
    [
        (0, False),
        (0.0, False),
        (False, False),
        ("0", False),
        (" False", False),
        ("0.0", False),
        (1, True),
        (1.0, True),
        (True, True),
        ("1", True),
        ("true", True),
        (None, None),
        (float("nan"), None),
    ],
)
def test_numbers_and_texts_are_flags(value: Any, flag: bool | None) -> None:
    conversation = normalized({"conversations": [ASK, {**ANSWER, "weight": value}, ANSWER]})
    assert conversation.flags[1] is flag
    assert conversation.messages[1] == {"role": "assistant", "content": "4"}


@pytest.mark.parametrize("value", [0.1, 2, -1, "0.5", "2", "nan", 10**400])
def test_other_numbers_drop_the_row(value: Any) -> None:
    reason, detail = rejected({"conversations": [ASK, {**ANSWER, "loss": value}]})
    assert (reason, detail) == ("fractional_weight", "turn 1: loss is neither 0 nor 1")
    for other in ({**ASK, "weight": value}, {"from": "system", "value": "", "weight": value}):
        assert normalized({"conversations": [other, ASK, ANSWER]}).flags[0] is None
    off = {**ANSWER, "loss": value, "train": False}
    assert normalized({"conversations": [ASK, off, ANSWER]}).flags[1] is False


@pytest.mark.parametrize("value", ["", "yes", [1], {"a": 1}])
def test_what_is_no_number_drops_the_row(value: Any) -> None:
    assert rejected({"conversations": [ASK, {**ANSWER, "train": value}]})[0] == "bad_message"


@given(
    st.dictionaries(
        st.sampled_from(TRAIN_FLAGS), st.sampled_from([None, 0, 1, 2, 0.5, True, False, "0", "1"])
    )
)
def test_of_several_flags_a_false_one_wins(flags: dict[str, Any]) -> None:
    given_flags = [value for value in flags.values() if value is not None]
    row = {"conversations": [ASK, {**ANSWER, **flags}, ASK, ANSWER]}
    if any(value in (0, "0") for value in given_flags):
        assert normalized(row).flags[1] is False
    elif any(value in (2, 0.5) for value in given_flags):
        assert rejected(row)[0] == "fractional_weight"
    else:
        assert normalized(row).flags[1] is (True if given_flags else None)


STRETCH = {"begin_offset": 0, "end_offset": 5}


@pytest.mark.parametrize("detail", [[], [STRETCH | {"train": True}], '[{"train": true}]', "null"])
def test_details_that_train_the_whole_turn(detail: Any) -> None:
    for key, flag in (("train", True), ("other", None)):
        answer = {**ANSWER, "train_detail": detail, key: True}
        conversation = normalized({"conversations": [ASK, answer]})
        assert conversation.flags[1] is flag
        assert "train_detail" not in conversation.messages[1]


@pytest.mark.parametrize(
    "detail",
    [[STRETCH | {"train": False}], [STRETCH], ["x"], "[", '[{"train": false}]', 3, {"train": True}],
)
def test_details_that_train_a_part_drop_the_row(detail: Any) -> None:
    reason, where = rejected({"conversations": [ASK, {**ANSWER, "train_detail": detail}]})
    assert reason == "partial_turn"
    assert where.startswith("turn 1: ")
    off = {**ANSWER, "train_detail": detail, "weight": 0}
    asked = {**ASK, "train_detail": detail}
    assert normalized({"conversations": [asked, off, ANSWER]}).flags == (None, False, None)


def test_cases_with_flags() -> None:
    assert take("shapes/axolotl_detail.jsonl").reasons == ["partial_turn"] * 3
    assert take("tool-arguments-2/weight_fraction.jsonl").reasons == ["fractional_weight"] * 3
    assert take("shapes/flag_text.jsonl").reasons == ["nothing_to_train"] * 3
    flags = [conversation.flags for conversation in take("shapes/slimorca.jsonl").conversations]
    assert flags == [(None, None, True), (None, False, None, True)]


def test_an_unknown_flag_is_not_taken_for_a_row_that_is_bad() -> None:
    with pytest.raises(RowRejected, match="fractional_weight"):
        normalized({"messages": [ASK, {**ANSWER, "step_loss_mask": 3}]})
