"""One JSON object that is all of a file: is it a row, does it hold rows, or is it something else?

    {"messages": [{"role": "user", …}]}              a row
    {"version": 1, "data": [{"messages": …}, …]}     holds rows, in the list under "data"
    {"prompt": ["a", "b"], "completion": ["c", "d"]} columns: refused, with how to turn them
    {"prompt": {"0": "a", "1": "b"}}                 columns as pandas writes them: refused
    {"train": [{…}, …], "test": [{…}, …]}            several lists of rows: refused

An object that has a column of a row is a row. Another one holds rows if exactly one of its keys has
a list of objects that are no turns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from miles.data.files.row_columns import FURTHER_COLUMNS, PROMPTS, USUAL_COLUMNS, USUAL_PAIRS
from miles.data.files.turn_values import is_turn

_SPACE = re.compile(r"[ \t\n\r]*")
_ROW_COLUMNS = frozenset(chain(*USUAL_COLUMNS.values(), *USUAL_PAIRS, PROMPTS))
"""An object with one of these is a row."""
_TURN_COLUMNS = frozenset((*USUAL_COLUMNS["messages"], *FURTHER_COLUMNS["messages"])) - {"data"}
"""Columns whose objects are turns."""
_MAX_NAMED = 4
_ROWS_OF = 'pandas.{read}.to_json(NEW, orient="records", lines=True)'


@dataclass(frozen=True)
class HeldRows:
    """An object that holds rows."""

    key: str


@dataclass(frozen=True)
class Fault:
    """An object that is no row, nor holds rows."""

    text: str
    """what it is, and what to do"""


@dataclass(frozen=True)
class _Entry:
    """A key of the object, and what is known of its value."""

    key: str
    value: Any
    """None where the text ends within it"""
    opening: str
    """its first character: [ or { or another"""
    first: Any
    """the first element of a list; None: it has none, or the text ends within it"""


def look_into(text: str, decoder: json.JSONDecoder) -> HeldRows | Fault | None:
    """Tell what an object is.

    Args:
        text: the object, from its brace on; it may be cut off anywhere.
        decoder: of JSON.

    Returns:
        None: a row.
    """
    entries, is_whole = _entries(text, decoder)
    rows = [entry.key for entry in entries if _holds_rows(entry)]
    if any(entry.key.lower() in _ROW_COLUMNS for entry in entries if entry.key not in rows):
        return _columns_fault(entries, is_whole)
    if len(rows) == 1:
        return HeldRows(rows[0])
    if rows:
        named = ", ".join(map(repr, rows[:_MAX_NAMED]))
        return Fault(
            f"one object that holds several lists of objects, under {named}: which of them are the "
            "rows is not clear. Write each list to a file of its own, and name those to train on"
        )
    return _columns_fault(entries, is_whole)


def _holds_rows(entry: _Entry) -> bool:
    """Return whether a value is a list of rows, and not one of turns or tools."""
    first = entry.first
    if entry.opening != "[" or not isinstance(first, dict):
        return False
    if any(isinstance(first.get(column), list) for column in USUAL_COLUMNS["messages"]):
        return True
    return entry.key.lower() not in _ROW_COLUMNS | _TURN_COLUMNS and not is_turn(first)


def _columns_fault(entries: Sequence[_Entry], is_whole: bool) -> Fault | None:
    """Return what is wrong with an object that has a list or an object for each column."""
    if not entries:
        return None
    if all(entry.opening == "{" and _is_numbered(entry) for entry in entries):
        return Fault(
            'columns, as pandas writes them ({"column": {"0": …}}), where one object a row was '
            f"expected. Write them as rows: {_ROWS_OF.format(read='read_json(OLD)')}"
        )

    lengths = {len(entry.value) for entry in entries if isinstance(entry.value, list)}
    is_columns = all(
        entry.opening == "[" and not isinstance(entry.first, dict) for entry in entries
    )
    is_even = len(lengths) <= 1 and 0 not in lengths
    if is_columns and is_even and (len(entries) > 1 or not is_whole):
        return Fault(
            'columns ({"column": [value, value, …]}), where one object a row was expected. Write '
            f"them as rows: {_ROWS_OF.format(read='DataFrame(json.load(open(OLD)))')}"
        )
    return None


def _is_numbered(entry: _Entry) -> bool:
    """Return whether an object has the keys "0", "1", …"""
    if isinstance(entry.value, Mapping):
        return list(entry.value) == [str(number) for number in range(len(entry.value))] != []
    return entry.first == "0"


def _entries(text: str, decoder: json.JSONDecoder) -> tuple[list[_Entry], bool]:
    """Return the keys of an object, and whether the text has it to its end."""
    entries: list[_Entry] = []
    at = _skip(text, 1)
    try:
        while text[at : at + 1] != "}":
            key, at = decoder.raw_decode(text, at)
            at = _skip(text, _skip(text, at) + 1)  # behind the colon

            opening = text[at : at + 1]
            try:
                value, end = decoder.raw_decode(text, at)
            except ValueError:
                entries.append(_Entry(key, None, opening, _first_of(text, at, decoder)))
                raise
            first = value[0] if isinstance(value, list) and value else None
            entries.append(_Entry(key, value, opening, first))
            at = _skip(text, end)
            if text[at : at + 1] == ",":
                at = _skip(text, at + 1)
    except (ValueError, RecursionError):
        return entries, False
    return entries, True


def _first_of(text: str, at: int, decoder: json.JSONDecoder) -> Any:
    """Return the first element of a list, or the first key of an object, that is cut off."""
    if text[at : at + 1] not in ("[", "{"):
        return None
    try:
        return decoder.raw_decode(text, _skip(text, at + 1))[0]
    except (ValueError, RecursionError):
        return None


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()
