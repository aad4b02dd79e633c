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
from miles.data.files import json_scan, parquet
from miles.data.files.file import File
from miles.data.files.json_blocks import json_blocks
from miles.data.files.row_shapes import FIRST_ROWS
from miles.data.types import MAX_ROW_BYTES

_BUFFER_BYTES = 1 << 20

Row = dict[str, Any]


def first_rows(file: File, wanted: frozenset[str]) -> tuple[list[Row], list[str]]:
    """Return the first rows of a file that has rows, and the names of all their columns.

    Args:
        wanted: columns that the rows must have; of Parquet no other one is read.

    Returns:
        At most `FIRST_ROWS` rows, without those that cannot be read: not UTF-8, or not a JSON
        object.

    Raises:
        SourceError: the file cannot be read.
    """
    if file.format == "parquet":
        return _first_parquet_rows(file, wanted)
    rows = _first_json_rows(file)
    return rows, list(dict.fromkeys(chain.from_iterable(rows)))


def _first_parquet_rows(file: File, wanted: frozenset[str]) -> tuple[list[Row], list[str]]:
    footer = parquet.footer(file.path, file.size_bytes, file.stamp)
    names = footer.schema.to_arrow_schema().names
    columns = [name for name in names if name in wanted]
    if not columns:
        return [], names

    group = next(number for number, group in enumerate(file.row_groups) if group.num_rows)
    with storage.reading(file.path):
        opened = parquet.open_file(
            file.path, file.size_bytes, file.stamp, buffer_bytes=_BUFFER_BYTES
        )
        batches = opened.iter_batches(
            FIRST_ROWS, row_groups=[group], columns=columns, use_threads=False
        )
        table = pa.Table.from_batches([next(batches)])

    rows = []
    for number in range(table.num_rows):
        try:
            rows += table.slice(number, 1).to_pylist()
        except (ValueError, OverflowError):  # not UTF-8, or a date that Python does not have
            continue
    return rows, names


def _first_json_rows(file: File) -> list[Row]:
    group = next(group for group in file.row_groups if group.num_rows)
    with storage.reading(file.path):
        (block,) = json_blocks(file, [group])
        payloads = json_scan.split_rows(file.format, block)

    rows = []
    for payload in payloads[:FIRST_ROWS]:
        if len(payload) > MAX_ROW_BYTES:
            continue
        try:
            row = json.loads(payload)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
