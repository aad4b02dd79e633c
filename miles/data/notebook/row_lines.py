"""Rows that are dicts -> JSON lines, checked value by value, one row in memory at a time.

{"messages": [{"role": "user", "content": "é"}], "score": 0.5}     one line, in UTF-8, keys as they come
{"score": numpy.int64(3)}       SourceError: row 7 (from 0), score: a value of type numpy.int64 …
{"score": float("nan")}         SourceError: row 7 (from 0), score: nan …

A tuple is written as a list, and a key that is a number as its text, as `json.dumps` does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

from miles.common.no_json import NoJsonError, as_json
from miles.common.shown import shown
from miles.errors import SourceError

_KEYS = (str, int, float, bool, type(None))
"""Types of keys that JSON writes as text."""


def write_lines(rows: Iterable[Any], file: BinaryIO) -> None:
    """Write rows as JSON lines.

    Args:
        rows: dicts, or other mappings; they are taken one by one.
        file: to write to.

    Raises:
        SourceError: a row is no dict, a value has no place in JSON, or there is no row at all.
    """
    has_rows = False
    for number, row in enumerate(rows):
        file.write(_line(number, row))
        has_rows = True
    if not has_rows:
        raise SourceError(
            "source= has no row: the list, or what the iterator gives, is empty. An iterator that "
            "was read before gives no row again; make it anew, or give a list"
        )


def _line(number: int, row: Any) -> bytes:
    """Return a row as a line.

    Args:
        number: of the row, from 0, for errors.
    """
    if type(row) is not dict:
        row = _as_dict(number, row)
    _require_own_names(number, row)
    try:
        return as_json(row) + b"\n"
    except NoJsonError as error:
        place, cause = error.fault
        where = f"row {number} (from 0)" + (f", {place}" if place else "")
        hint = ". A data frame may have it, given as it is" if cause.startswith("nan") else ""
        raise SourceError(f"source=: {where}: {cause}{hint}") from None


def _require_own_names(number: int, row: dict[Any, Any]) -> None:
    """Refuse columns that have one name in JSON, such as 1 and "1": only one would be kept."""
    others = [key for key in row if type(key) is not str and isinstance(key, _KEYS)]
    for key in others:
        name = next(iter(json.loads(json.dumps({key: 0}))))
        if name in row and name is not key:
            raise SourceError(
                f"source=: row {number} (from 0): columns {key!r} and {name!r} have one name in "
                "JSON; rename one of them"
            )


def _as_dict(number: int, row: Any) -> dict[Any, Any]:
    if isinstance(row, Mapping):
        return dict(row)

    hint = ""
    if isinstance(row, list | tuple) and row and isinstance(row[0], Mapping):
        hint = ': a list of messages is one as {"messages": [...]}'
    elif isinstance(row, str):
        hint = ": a text is one as {'text': ...}. Paths are given as a text or as a list of texts"
    elif isinstance(row, os.PathLike):
        hint = ": paths are given as a list, list(folder.glob(...))"
    elif hasattr(row, "__arrow_c_stream__") or hasattr(row, "__arrow_c_array__"):
        hint = ": tables are given as one, pyarrow.concat_tables([...])"
    raise SourceError(
        f"source=: row {number} (from 0) must be a dict that names its columns, not {shown(row)} "
        f"({type(row).__name__}){hint}"
    )
