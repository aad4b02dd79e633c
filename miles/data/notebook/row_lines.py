"""Rows that are dicts -> JSON lines, checked value by value, one row in memory at a time.

{"messages": [{"role": "user", "content": "é"}], "score": 0.5}     one line, in UTF-8, keys as they come
{"score": numpy.int64(3)}       SourceError: row 7 (from 0), score: a value of type numpy.int64 …
{"score": float("nan")}         SourceError: row 7 (from 0), score: nan …

A tuple is written as a list, and a key that is a number as its text, as `json.dumps` does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from miles.common.shown import shown
from miles.errors import SourceError

_KNOWN = (str, int, float, bool, type(None))
_REMEDIES = {
    "numpy": "take value.item(), or value.tolist() of an array",
    "datetime": "take value.isoformat()",
    "builtins.bytes": "take value.decode()",
    "builtins.set": "take sorted(value)",
    "decimal": "take float(value), or str(value)",
    "PIL": "leave the column out: pictures are not trained on",
}
"""Module, or module and type, of a value -> what to write in its place."""
_DEEPEST = 200
"""A value nested deeper is taken for one that contains itself."""


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
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair: JSON can write it, UTF-8 cannot
        return json.dumps(row, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        place, cause = next(_faults(row, ()), ("", str(error)))
        where = f"row {number} (from 0)" + (f", {place}" if place else "")
        raise SourceError(f"source=: {where}: {cause}") from None


def _as_dict(number: int, row: Any) -> dict[Any, Any]:
    if isinstance(row, Mapping):
        return dict(row)

    hint = ""
    if isinstance(row, list | tuple) and row and isinstance(row[0], Mapping):
        hint = ': a list of messages is one as {"messages": [...]}'
    elif isinstance(row, str):
        hint = ": a text is one as {'text': ...}. Paths are given as a text or as a list of texts"
    raise SourceError(
        f"source=: row {number} (from 0) must be a dict that names its columns, not {shown(row)} "
        f"({type(row).__name__}){hint}"
    )


def _faults(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    """Yield the place of each value that has no place in JSON, and the rest of a sentence on it."""
    if len(path) > _DEEPEST:
        yield _place(path[:3]), "it is nested too deeply, or contains itself"
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, _KNOWN):
                yield _place(path), f"a key of type {_type_name(key)}; a key must be text"
            yield from _faults(inner, (*path, key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _faults(inner, (*path, index))
    elif isinstance(value, float) and not math.isfinite(value):
        yield (
            _place(path),
            f"{value}, which JSON has no number for. Write None for a missing value; a data frame, "
            "given as it is, needs no change",
        )
    elif not isinstance(value, _KNOWN):
        yield (
            _place(path),
            f"a value of type {_type_name(value)}, which JSON has no place for{_remedy(value)}",
        )


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else _full_name(kind)


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _remedy(value: Any) -> str:
    kind = type(value)
    remedy = _REMEDIES.get(_full_name(kind)) or _REMEDIES.get(kind.__module__.split(".")[0])
    return f". In its place {remedy}" if remedy else ""


def _place(path: tuple[Any, ...]) -> str:
    """Return a path of keys as people write it: `messages[1].content`."""
    text = ""
    for part in path:
        is_index = isinstance(part, int) and not isinstance(part, bool)
        text += f"[{part}]" if is_index else f".{part}"
    return shown_path(text.removeprefix("."))


def shown_path(text: str) -> str:
    """Return a path of keys, cut where it is long, on one line."""
    text = text.replace("\n", "↵")
    return text if len(text) <= _MOST_OF_A_PATH else f"{text[:_MOST_OF_A_PATH]}…"


_MOST_OF_A_PATH = 120
