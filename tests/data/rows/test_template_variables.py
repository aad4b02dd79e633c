"""Template variables that a row brings: where they are looked for, and what they may be."""

import json
from typing import Any

import pytest

from miles.data.config import RowFormat
from miles.data.rows.json_text import MAX_DEPTH
from miles.data.rows.normalize import normalize
from miles.data.types import RowRejected

TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def variables_of(value: Any, column: str = "chat_template_kwargs", **named: str) -> Any:
    row = {"messages": TURNS, column: value}
    return normalize(json.dumps(row).encode(), RowFormat("messages", named)).template_kwargs


@pytest.mark.parametrize(
    "variables", [{"enable_thinking": False}, {"style": None, "tools": [{"a": None}], "é": "😀"}]
)
def test_an_object_or_its_json_text(variables: dict[str, Any]) -> None:
    assert variables_of(variables) == variables
    assert variables_of(json.dumps(variables)) == variables
    assert variables_of(json.dumps(variables, ensure_ascii=False)) == variables
    assert variables_of(variables, "extra", template_kwargs="extra") == variables


@pytest.mark.parametrize("value", [None, {}, "", "  ", "null", "{}"])
def test_no_variables(value: Any) -> None:
    assert variables_of(value) == {}
    assert variables_of({"a": 1}, "other") == {}


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ("alpaca", {"instruction": "2+2?", "output": "4"}),
        ("prompt_completion", {"prompt": "2+2?", "completion": "4"}),
    ],
)
def test_other_shapes_have_them_too(shape: str, row: dict[str, Any]) -> None:
    payload = json.dumps(row | {"chat_template_kwargs": {"a": 1}}).encode()
    assert normalize(payload, RowFormat(shape)).template_kwargs == {"a": 1}


@pytest.mark.parametrize(
    ("value", "reject"),
    [
        ([], "bad_message: column chat_template_kwargs is a list, not an object"),
        (1, "bad_message: column chat_template_kwargs is"),
        ("[1]", "bad_message: column chat_template_kwargs is a list, not an object"),
        ("{'a': 1}", "malformed_json: the column chat_template_kwargs is not JSON"),
        ({"a": "\ud83d"}, "malformed_json: the column chat_template_kwargs: half of a surrogate"),
        ("[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH, "bad_message"),
        ("[" * (MAX_DEPTH + 1) + "1" + "]" * (MAX_DEPTH + 1), "malformed_json"),
    ],
)
def test_a_row_is_dropped_whose_variables_are_no_object(value: Any, reject: str) -> None:
    with pytest.raises(RowRejected, match=reject):
        variables_of(value)
