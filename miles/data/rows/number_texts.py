"""Numbers where a text is expected -> the text as the file has it.

    {"question": "1+1", "answer": 2}       ->  answer "2"
    {"question": "1+0.5", "answer": 1.50}  ->  answer "1.50"
    {"question": "1>0?", "answer": true}   ->  answer "true"

The value of a number has lost how it was written, so that the row is decoded once more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from typing import Any

from miles.data.config import RowFormat
from miles.data.files.row_columns import (
    FURTHER_COLUMNS,
    FURTHER_PAIRS,
    PROMPTS,
    USUAL_COLUMNS,
    USUAL_PAIRS,
    with_usual_names,
)

_BOM = b"\xef\xbb\xbf"
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


def _text(value: Any) -> str:
    if type(value) is bool:
        return "true" if value else "false"
    assert type(value) is str, "numbers are decoded as text"
    return value
