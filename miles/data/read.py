"""Row ids -> rows as JSON text, reading only the row groups that hold them.

    [2418, 7, 1002]  ->  [b'{"messages": …}', b'{"conversations": …}', …]   in the order asked

A JSON file's rows are handed through as the bytes that they are: whether they are JSON, `normalize` judges.
Parquet's rows become JSON: dates in ISO 8601, decimals as text, NaN as null.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from miles import storage
from miles.data import scan
from miles.data.manifest import File, Manifest, file_stamp, open_parquet
from miles.data.types import Int64
from miles.errors import SourceError

UNREADABLE_ROW = b"\xff"
"""Stands for a Parquet row that cannot be made text (a string that is not UTF-8): no JSON, so it is rejected."""


def read_rows(manifest: Manifest, row_ids: Int64) -> list[bytes]:
    """Reads rows.

    Args:
        manifest: as it was built; a file that has changed since is refused.
        row_ids: int64 [rows], in any order.

    Returns:
        Each row as JSON text (UTF-8), in the order asked.

    Raises:
        SourceError: a file is gone, has changed or cannot be read; it names the file.
    """
    row_ids = np.asarray(row_ids, dtype=np.int64)
    assert len(row_ids) == 0 or (row_ids.min() >= 0 and row_ids.max() < manifest.num_rows), "no such row"
    by_position = np.argsort(row_ids, kind="stable")
    ordered = row_ids[by_position]
    groups, begins = np.unique(np.searchsorted(manifest.group_starts, ordered, side="right") - 1, return_index=True)
    ends = np.append(begins[1:], len(ordered))

    payloads: list[bytes] = [b""] * len(row_ids)
    at = 0
    while at < len(groups):
        # All groups of one file, in file order: it is opened once, and a compressed one is streamed once.
        _, file, _ = manifest.group_location(int(groups[at]))
        indices, wanted, position = [], [], int(begins[at])
        while at < len(groups):
            _, next_file, index = manifest.group_location(int(groups[at]))
            if next_file is not file:
                break
            indices.append(index)
            wanted.append(ordered[begins[at] : ends[at]] - manifest.group_starts[groups[at]])
            at += 1
        for rows in _read_groups(file, indices, wanted):
            for row in rows:
                payloads[by_position[position]] = row
                position += 1
    return payloads


def _read_groups(file: File, indices: Sequence[int], wanted: Sequence[Int64]) -> Iterator[list[bytes]]:
    """The wanted rows (int64, numbers within the group) of each of a file's groups, which are in file order."""
    if (file.size_bytes, file.stamp) != file_stamp(file.path):
        raise SourceError(
            f"{file.path}: changed since its rows were counted (was {file.size_bytes} bytes, {file.stamp}). A run "
            "reads the files that it began with: bring the old file back, or start anew with another --save"
        )
    if file.format == "parquet":
        yield from _parquet_groups(file, indices, wanted)
        return
    for index, block, rows in zip(indices, _blocks(file, indices), wanted, strict=True):
        with scan.reading(file.path):
            lines = scan.split_rows(file.format, block)
        if len(lines) != file.row_groups[index].num_rows:
            raise SourceError(f"{file.path}: row group {index} no longer holds the rows that were counted")
        yield [lines[row] for row in rows]


def _blocks(file: File, indices: Sequence[int]) -> Iterator[bytes]:
    """The bytes of a JSON file's row groups."""
    groups = [file.row_groups[index] for index in indices]
    if file.compression is None:
        fs, path = storage.filesystem(file.path)
        for group in groups:
            with scan.reading(file.path):
                end = group.offset_bytes + group.length_bytes
                block = fs.cat_file(path, start=group.offset_bytes, end=end)
            yield block
        return
    chunks = scan.read_chunks(file.path, file.compression)
    buffer, base = b"", 0  # buffer[0] is byte `base` of the decompressed file
    for group in groups:
        end = group.offset_bytes + group.length_bytes
        while base + len(buffer) < end:
            passed = min(group.offset_bytes - base, len(buffer))
            with scan.reading(file.path):
                chunk = next(chunks, None)
            if chunk is None:
                raise SourceError(f"{file.path}: ends before the rows that were counted do")
            buffer, base = buffer[passed:] + chunk, base + passed
        yield buffer[group.offset_bytes - base : end - base]


def _parquet_groups(file: File, indices: Sequence[int], wanted: Sequence[Int64]) -> Iterator[list[bytes]]:
    with open_parquet(file.path) as parquet:
        for index, rows in zip(indices, wanted, strict=True):
            with scan.reading(file.path):
                # One thread: the loader's share of the machine is an explicit number of processes.
                table = parquet.read_row_group(index, use_threads=False).take(pa.array(rows))
                payloads = _table_to_json(table)
            yield payloads


def _table_to_json(table: pa.Table) -> list[bytes]:
    for number, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type) and field.type.unit == "ns":
            # Python's datetime ends at microseconds; pyarrow refuses rather than round.
            micro = table.column(number).cast(pa.timestamp("us", field.type.tz), safe=False)
            table = table.set_column(number, field.name, micro)
    try:
        rows = table.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a date that Python has not
        if table.num_rows == 1:
            return [UNREADABLE_ROW]
        return [row for i in range(table.num_rows) for row in _table_to_json(table.slice(i, 1))]
    return [_row_to_json(row) for row in rows]


def _row_to_json(row: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(row, default=_to_text, option=orjson.OPT_PASSTHROUGH_DATETIME)  # NaN becomes null
    except TypeError:  # nested deeper than orjson goes
        return _ENCODER.encode(_plain(row)).encode("ascii")


def _to_text(value: Any) -> str:
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    return str(value)


def _plain(value: Any) -> Any:
    """The same value with null for NaN and infinities, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


_ENCODER = json.JSONEncoder(ensure_ascii=True, allow_nan=False, check_circular=False, default=_to_text)
