"""Numbers where a text is expected -> the text as the file has it.

    {"question": "1+1", "answer": 2}       ->  answer "2"
    {"question": "1+0.5", "answer": 1.50}  ->  answer "1.50"
    {"question": "1>0?", "answer": true}   ->  answer "true"

NaN and Infinity, which JSON does not have, are null, but for calls and weights: these drop the row.
The value of a number has lost how it was written, so that the row is decoded once more.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from itertools import chain
from typing import Any, NoReturn

from miles.data.config import RowFormat
from miles.data.files.row_columns import (
    FURTHER_COLUMNS,
    FURTHER_PAIRS,
    PROMPTS,
    USUAL_COLUMNS,
    USUAL_PAIRS,
    with_usual_names,
)
from miles.data.rows.json_text import has_no_finite_form
from miles.data.rows.reject import reject
from miles.data.rows.train_flags import TRAIN_FLAGS

_CALLS = ("tool_calls", "function_call", "arguments", "content")
"""Keys of a turn, or of a call in a column of its own, that may hold a call's arguments."""
_INFINITIES = (float("inf"), float("-inf"))
_BOM = codecs.BOM_UTF8
_NUMBERS = frozenset((int, float, bool))
_FIELDS = ("instruction", "input", "output", "prompt", "completion", "chosen", "text")
"""Fields that hold text."""
_COLUMNS = frozenset(
    chain(
        *(USUAL_COLUMNS.get(field, ()) for field in _FIELDS),
        FURTHER_COLUMNS["output"],
        *USUAL_PAIRS,
        *FURTHER_PAIRS,
        PROMPTS,
    )
)
_AS_WRITTEN = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=lambda name: None)


class NotFiniteError(Exception):
    """A row has NaN or an infinity, which JSON does not have."""


def _refuse(name: str) -> NoReturn:
    raise NotFiniteError(name)


FINITE_DECODER = json.JSONDecoder(parse_constant=_refuse)
"""Decodes most rows; raises `NotFiniteError`."""


def text_of_row(payload: bytes) -> str:
    """Return the JSON text of a row, without a byte-order mark.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    if payload.startswith(_BOM):
        payload = payload[len(_BOM) :]
    return payload.decode("utf-8")


def with_number_texts(
    row: Mapping[str, Any], payload: bytes, format: RowFormat
) -> Mapping[str, Any]:
    """Return a row with text in place of the numbers in columns of text.

    Args:
        row: the decoded row, as `with_usual_names` returns it.
        payload: the row's JSON.
    """
    if _NUMBERS.isdisjoint(map(type, row.values())):  # most rows
        return row
    named = {format.columns[field] for field in _FIELDS if field in format.columns}
    numbers = [
        name
        for name, value in row.items()
        if type(value) in _NUMBERS and (name in _COLUMNS or name in named)
    ]
    if not numbers:
        return row

    written = with_usual_names(_AS_WRITTEN.decode(text_of_row(payload)), format.columns)
    texts = {name: _text(written[name]) for name in numbers}
    return {**row, **texts}


def require_finite(payload: bytes) -> None:
    """Reject a row with NaN or Infinity in a call's arguments, or with an infinite weight.

    Args:
        payload: the row's JSON, which has been decoded.
    """
    for column, turns in json.loads(text_of_row(payload)).items():
        for number, turn in enumerate(turns if type(turns) is list else ()):
            if type(turn) is not dict:
                continue
            where = f"column {column}, entry {number}"
            for key in TRAIN_FLAGS:
                if type(turn.get(key)) is float and turn[key] in _INFINITIES:
                    reject("fractional_weight", f"{where}: {key} is infinite")
            for key in _CALLS:
                if type(turn.get(key)) in (dict, list) and has_no_finite_form(turn[key]):
                    reject("bad_tool_call", f"{where}: {key} has a number that JSON does not have")


def _text(value: Any) -> str:
    if type(value) is bool:
        return "true" if value else "false"
    assert type(value) is str, "numbers are decoded as text"
    return value
