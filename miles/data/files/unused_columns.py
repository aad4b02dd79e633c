"""The columns of a source that none of its first rows is read from.

{"id": 7, "question": "2+2?", "answer": "4", "context": null}     read from question and answer
->  id                                                            null says nothing
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from miles.data.config import RowFormat
from miles.data.files.row_columns import TOOLS_WITHIN
from miles.data.files.row_shapes import find_columns
from miles.data.unused_names import few_names

_TOOLS = '"tools"'


def unused_columns(
    format: RowFormat, rows: Sequence[Mapping[str, Any]], columns: Iterable[str]
) -> tuple[str, ...]:
    """Return the columns of which nothing is made, in the order of the file.

    Args:
        format: of the source.
        rows: its first rows. One may lack a column from which no row of the format is read.
        columns: all columns of those rows.
    """
    used: set[str] = set()
    for row in rows:
        used.update(find_columns(format, [row]).values())
        if _TOOLS in _as_text(row.get(TOOLS_WITHIN)):
            used.add(TOOLS_WITHIN)
    # A column that is named by a path is used as far as the path goes.
    used |= {name.split(".")[0] for name in used}

    return few_names(name for name in columns if name not in used and _may_speak(name, rows))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _may_speak(column: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a column is not known to be null in all rows."""
    values = [row[column] for row in rows if column in row]
    return not values or any(value is not None for value in values)
