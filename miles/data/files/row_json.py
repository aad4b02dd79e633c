"""Rows of an Arrow table -> JSON text, as a JSON file would hold them.

    timestamp   "2024-05-01T12:30:00"      decimal   "1.50"      NaN     null
    bytes       text, as they are UTF-8    UUID      "3b55…"     a map   an object

Null fields of structs are left out (`arrow_values`); a column that is null is null.

A row that cannot be made text stands as `UNREADABLE_ROW`, which is no JSON: it is rejected when it
is normalized.
"""

from __future__ import annotations

import datetime
import json
import math
from typing import Any

import orjson
import pyarrow as pa

from miles.data.files.arrow_types import has_map, has_views
from miles.data.files.arrow_values import has_padding, remove_padding
from miles.data.types import UNREADABLE_ROW, Int64


def rows_to_json(batch: pa.RecordBatch, numbers: Int64) -> list[bytes]:
    """Return some rows of a batch, each as a JSON object in UTF-8.

    Args:
        numbers: int64 [rows], of the rows within the batch.
    """
    if batch.num_columns == 0:  # Arrow forgets the number of rows
        return [b"{}"] * len(numbers)
    table = pa.Table.from_batches([batch])
    if any(map(has_views, batch.schema)):
        rows = table_to_json(table)
        return [rows[number] for number in numbers]
    return table_to_json(table.take(pa.array(numbers)))


def table_to_json(table: pa.Table) -> list[bytes]:
    """Return each row as a JSON object in UTF-8."""
    table = _with_microseconds(table)
    try:
        rows = _rows(table)
    # Text that is not UTF-8, a date that Python does not have, or a map with a key twice.
    except (ValueError, OverflowError, KeyError):
        if table.num_rows == 1:
            return [UNREADABLE_ROW]
        payloads = []
        for number in range(table.num_rows):
            payloads += table_to_json(table.slice(number, 1))
        return payloads
    return [_row_to_json(row) for row in rows]


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    """Return each row as an object, without the padding of structs."""
    # Without maps it is many times as fast.
    maps = "strict" if any(map(has_map, table.schema)) else None
    rows: list[dict[str, Any]] = table.to_pylist(maps_as_pydicts=maps)
    for name, column in zip(table.column_names, table.columns, strict=True):
        if any(map(has_padding, column.chunks)):
            remove_padding(column.combine_chunks(), [row[name] for row in rows])
    return rows


def _with_microseconds(table: pa.Table) -> pa.Table:
    """Cut timestamps to microseconds, where Python's datetime ends; pyarrow would refuse them."""
    for number, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type) and field.type.unit == "ns":
            cut = table.column(number).cast(pa.timestamp("us", field.type.tz), safe=False)
            table = table.set_column(number, field.name, cut)
    return table


def _row_to_json(row: dict[str, Any]) -> bytes:
    try:
        # NaN becomes null.
        return orjson.dumps(row, default=_to_text, option=orjson.OPT_PASSTHROUGH_DATETIME)
    except TypeError:  # nested deeper than orjson goes, or bytes that are no text
        try:
            return _ENCODER.encode(_without_nan(row)).encode("ascii")
        except UnicodeDecodeError:
            return UNREADABLE_ROW


def _to_text(value: Any) -> str:
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode()
    return str(value)


def _without_nan(value: Any) -> Any:
    """Return the same value with null for NaN and infinities, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value


_ENCODER = json.JSONEncoder(
    ensure_ascii=True, allow_nan=False, check_circular=False, default=_to_text
)
