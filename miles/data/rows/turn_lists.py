"""The value of a column that holds a conversation -> the list that `read_turns` takes.

'[{"role": …}, …]'                                  the list that the JSON text has
{"from": ["human", "gpt"], "value": ["Hi", "Yes"]}  [{"from": "human", "value": "Hi"}, …]
{"turn_1": {"Human": "<|Human|>: Hi<eoh>", …}}      [{"role": "user", "content": "Hi"}, …]
{"role": "assistant", "content": "Yes"}             a list of this one
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from miles.data.files.turn_values import (
    NUMBERED_TURN,
    is_object_of_turns,
    is_struct_of_lists,
    is_turn,
)
from miles.data.rows.json_text import ROW_DECODER, require_json
from miles.data.rows.reject import reject, type_of

_MOSS_ROLES = (("Human", "user"), ("MOSS", "assistant"))
_MOSS_MARKS = re.compile(r"\s*(?:<\|[A-Za-z ]+\|>:)?\s*(.*?)\s*(?:<eo[a-z]>)?\s*", re.DOTALL)
_MOSS_NOTHING = ("", "None")
_MOST_LITERAL = 1 << 20


def turn_list(value: Any, column: str) -> list[Any]:
    """Return the turns in a column's value, one or more; reject a row without."""
    if type(value) is str:
        value = _decoded(value, column)
    if type(value) is dict:
        value = _turns_of_object(value, column)
    if type(value) is not list:
        reject("no_messages", f"column {column} is {type_of(value)}, not a list")
    if not value:
        reject("no_messages", f"column {column} is empty")
    return value


def _decoded(text: str, column: str) -> Any:
    if text.lstrip().startswith(("[{'", '[{"')) and _is_python(text):
        reject(
            "malformed_json",
            f"column {column} is the text of a Python list, which is not JSON: write the list "
            "itself, or json.dumps of it, not str of it",
        )
    return require_json(text, f"column {column}", ROW_DECODER)


def _is_python(text: str) -> bool:
    """Return whether a text is a Python value with single quotes, as `str` writes lists."""
    if not text.lstrip().startswith("[{'") or len(text) > _MOST_LITERAL:
        return False
    try:
        ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def _turns_of_object(value: Mapping[str, Any], column: str) -> Any:
    if is_turn(value):
        return [value]
    if is_object_of_turns(value):
        return _moss_turns(value, column)
    if is_struct_of_lists(value):
        return _transposed(value, column)
    return value


def _transposed(value: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    lists = {key: items for key, items in value.items() if items is not None}
    lengths = sorted({len(items) for items in lists.values()})
    if len(lengths) > 1:
        reject(
            "bad_message",
            f"column {column} is an object of lists of {lengths[0]} to {lengths[-1]} values; "
            "expected one value a turn in each",
        )
    return [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]


def _moss_turns(value: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """Return the turns of a MOSS conversation, without its marks.

    A turn with thoughts, commands or results of plugins is rejected: they are not read.
    """
    turns: list[dict[str, Any]] = []
    for key in sorted(value, key=_turn_number):
        turn = value[key]
        if type(turn) is not dict:
            reject("bad_message", f"column {column}, {key} is {type_of(turn)}, not an object")

        parts = {name: _moss_text(text, f"{column}, {key}") for name, text in turn.items()}
        for name, role in _MOSS_ROLES:
            if name in parts:
                turns.append({"role": role, "content": parts.pop(name)})
        if any(part not in _MOSS_NOTHING for part in parts.values()):
            reject(
                "bad_message",
                f"column {column}, {key} has thoughts, commands or results beside what is said, "
                "which are not read",
            )
    return turns


def _turn_number(key: str) -> int:
    match = NUMBERED_TURN.fullmatch(key)
    assert match is not None, "the object has turns alone"
    return int(match[1])


def _moss_text(text: Any, where: str) -> str:
    if text is None:
        return ""
    if type(text) is not str:
        reject("bad_message", f"column {where} holds {type_of(text)}, not text")
    match = _MOSS_MARKS.fullmatch(text)
    assert match is not None, "the pattern takes any text"
    return match[1]
