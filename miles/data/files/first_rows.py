"""The first rows of a file, read once to detect their shape.

Only the beginning of the file is read: of Parquet a buffer of those columns that matter, of JSON
the first row group.
"""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

import pyarrow as pa

from miles.common import storage
from miles.data import transforms
from miles.data.files import first_faults
from miles.data.files.arrow_types import is_text, parts
from miles.data.files.file import TABLES, File
from miles.data.files.json_blocks import json_blocks, rows_of_block
from miles.data.files.made_rows import transformed
from miles.data.files.row_json import table_to_json
from miles.data.files.row_shapes import FIRST_ROWS
from miles.data.files.table_rows import first_batches
from miles.data.transforms import Transform
from miles.data.types import MAX_ROW_BYTES, UNREADABLE_ROW, RowRejected
from miles.errors import SourceError

Row = dict[str, Any]


def first_rows(
    file: File,
    wanted: frozenset[str],
    *,
    any_needed: bool = False,
    transform: Transform | None = None,
) -> tuple[list[Row], list[str]]:
    """Return the first rows of a file that has rows, and the names of all their columns.

    Args:
        wanted: columns that the rows must have, in any case; of Parquet no other one is read but
            nested ones with text in them, which may hold turns.
        any_needed: rows of which none can be read tell no shape, and are an error.
        transform: the user's function; the rows and columns are those behind it, all of them.

    Returns:
        At most `FIRST_ROWS` rows, without those that cannot be read: not UTF-8, or not a JSON
        object.

    Raises:
        SourceError: the file cannot be read, or none of its first rows can, and one is needed.
    """
    if transform is not None:
        rows = _first_made_rows(file, transform, any_needed)
        return rows, list(dict.fromkeys(chain.from_iterable(rows)))
    if file.format in TABLES:
        return _first_table_rows(file, wanted)
    rows = _first_json_rows(file, any_needed)
    return rows, list(dict.fromkeys(chain.from_iterable(rows)))


def _first_table_rows(file: File, wanted: frozenset[str]) -> tuple[list[Row], list[str]]:
    names = list(file.columns.names)
    columns = [
        column.name
        for column in file.columns.schema
        if column.name not in file.unread_columns and _may_matter(column, wanted)
    ]
    if not columns:
        return [], names

    with storage.reading(file.path):
        batches = first_batches(file, columns, FIRST_ROWS)
        payloads = chain.from_iterable(table_to_json(pa.table(batch)) for batch in batches)
        rows = [json.loads(payload) for payload in payloads if payload != UNREADABLE_ROW]
    return rows, names


def _first_made_rows(file: File, transform: Transform, any_needed: bool) -> list[Row]:
    """Return the rows that the user's function makes of the first rows of a file.

    Raises:
        SourceError: it makes none, and one is needed; says what became of the first one.
    """
    rows = []
    outcomes = []
    payloads = _first_payloads(file)
    for payload in payloads:
        try:
            row = _parsed(transformed(payload, transform))
        except RowRejected as rejected:
            outcomes.append(f"{rejected.reason}, {rejected.detail}")
            continue
        if row is not None:
            rows.append(row)
        else:
            outcomes.append("the row cannot be read")

    if any_needed and not rows:
        raise SourceError(
            f"{file.path}: {transforms.FLAG} {transform.name} makes no row of the first "
            f"{len(payloads)}; of the first one: {outcomes[0]}. The shape of the rows is told from "
            "those that it makes: mend the function, or name the shape with --row-shape"
        )
    return rows


def _first_payloads(file: File) -> list[bytes]:
    """Return the first rows of a file as JSON text, with all columns that are read."""
    with storage.reading(file.path):
        if file.format in TABLES:
            names = [name for name in file.columns.names if name not in file.unread_columns]
            batches = first_batches(file, names, FIRST_ROWS) if names else ()
            tables = (table_to_json(pa.table(batch)) for batch in batches)
            return list(chain.from_iterable(tables))[:FIRST_ROWS]

        group = next(group for group in file.row_groups if group.num_rows)
        (block,) = json_blocks(file, [group])
        return rows_of_block(file, block)[:FIRST_ROWS]


def _may_matter(column: pa.Field, wanted: frozenset[str]) -> bool:
    """Return whether a column is wanted, or is a list or struct with text, which may hold turns."""
    if column.name in wanted or column.name.lower() in wanted:
        return True
    return column.type.num_fields > 0 and any(is_text(part.type) for part in parts(column))


def _first_json_rows(file: File, any_needed: bool) -> list[Row]:
    group = next(group for group in file.row_groups if group.num_rows)
    with storage.reading(file.path):
        (block,) = json_blocks(file, [group])
        payloads = rows_of_block(file, block)

    rows = [row for payload in payloads[:FIRST_ROWS] if (row := _parsed(payload)) is not None]
    if any_needed and not rows:
        num_looked_at = min(len(payloads), FIRST_ROWS)
        raise SourceError(
            f"{file.path}: none of the first {num_looked_at} rows can be read. The first one is at "
            f"{first_faults.describe(file, block, payloads[0])}"
        )
    return rows


def _parsed(payload: bytes) -> Row | None:
    """Return a row; None: it cannot be read."""
    if len(payload) > MAX_ROW_BYTES:
        return None
    try:
        row = json.loads(payload.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
