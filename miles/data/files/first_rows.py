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
from miles.data.files.file import File, RowGroup
from miles.data.files.row_shapes import FIRST_ROWS

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
        payloads = json_scan.split_rows(file.format, _group_bytes(file, group))

    rows = []
    for payload in payloads[:FIRST_ROWS]:
        try:
            row = json.loads(payload)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _group_bytes(file: File, group: RowGroup) -> bytes:
    """Return the bytes of a JSON file's first row group, decompressed."""
    end = group.offset_bytes + group.length_bytes
    if file.compression is None:
        return storage.RangeFile(file.path, file.size_bytes).read_range(group.offset_bytes, end)

    content = bytearray()
    for chunk in json_scan.read_chunks(file.path, file.compression):
        content += chunk
        if len(content) >= end:
            break
    return bytes(content[group.offset_bytes : end])
