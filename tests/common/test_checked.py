"""Arguments that are known to fit by their types alone fit by their annotations, too."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles.common.checked import checked
from miles.errors import ConfigError


@checked
def given(messages: Sequence[Mapping[str, Any]], tokenizer: Any = None) -> tuple[Any, Any]:
    return messages, tokenizer


@pytest.mark.parametrize(
    "messages", [[], [{"a": 1}], [OrderedDict(a=1), {"b": 2}], ({"a": 1},), np.array([{"a": 1}])]
)
def test_mappings_are_passed_as_they_are(messages: Any) -> None:
    assert given(messages)[0] is messages


@pytest.mark.parametrize("messages", [[{1: 1}], [{"a": 1}, {2: 3}], [[1]], [None], "ab", {}, None])
def test_what_is_no_list_of_mappings_is_refused(messages: Any) -> None:
    with pytest.raises(ConfigError, match="messages must be a sequence of mappings, not"):
        given(messages)


def test_any_value_but_paths_and_numbers_of_numpy_stays_as_it_is() -> None:
    other = object()
    assert given([], other)[1] is other
    assert given([], Path("a"))[1] == "a"
    assert given([], b"ab")[1] == b"ab"
    assert given([], ["b", Path("a")])[1] == ["b", "a"]
    assert type(given([], np.int64(3))[1]) is int


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "ask: missing a required argument: 'question'; its arguments are question, times"),
        ({"question": "?", "tims": 2}, "unexpected keyword argument 'tims'; did you mean times?"),
    ],
)
def test_a_missing_or_unknown_argument_is_an_error_of_ours(
    arguments: dict[str, Any], message: str
) -> None:
    @checked
    def ask(question: str, times: int = 1) -> str:
        return question * times

    with pytest.raises(ConfigError) as caught:
        ask(**arguments)
    assert message in str(caught.value)
