"""Row numbers -> rows, as JSON text. Reads the row groups that hold them, each once.

Parquet rows become JSON; JSON rows are handed through as they stand, malformed ones too, since it is for
`normalize` to judge a row.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from miles import storage
from miles.data.manifest import File, Manifest, file_stamp
from miles.data.scan import split_rows
from miles.data.types import Int64
from miles.errors import SourceError


def read_rows(manifest: Manifest, row_ids: Int64) -> list[bytes]:
    """The rows of `row_ids`, in that order, each as UTF-8 JSON text.

    Raises:
        SourceError: a file that is gone, or is no longer the one that the manifest counted.
    """
    rows: list[bytes] = [b""] * len(row_ids)
    group_of_row = np.searchsorted(manifest.group_starts, row_ids, side="right") - 1
    checked: set[str] = set()
    for group in np.unique(group_of_row):
        _, file, index = manifest.groups[group]
        if file.path not in checked:
            _require_unchanged(file)
            checked.add(file.path)
        wanted = np.flatnonzero(group_of_row == group)
        inside = row_ids[wanted] - manifest.group_starts[group]
        for position, row in zip(wanted, _read_group(file, index, inside), strict=True):
            rows[position] = row
    return rows


def _require_unchanged(file: File) -> None:
    try:
        found = file_stamp(file.path)
    except FileNotFoundError as error:
        raise SourceError(f"{file.path}: the file was there when the run began, and is gone") from error
    if found != (file.size_bytes, file.stamp):
        raise SourceError(
            f"{file.path}: the file has changed since its rows were counted (then {file.size_bytes} bytes, "
            f"{file.stamp}; now {found[0]} bytes, {found[1]}). Row numbers no longer hold; start a new run."
        )


def _read_group(file: File, index: int, inside: Int64) -> list[bytes]:
    """Rows `inside` of a file's row group."""
    fs, name = storage.filesystem(file.path)
    if file.format == "parquet":
        try:
            with fs.open(name, "rb") as stream:
                table = pq.ParquetFile(stream).read_row_group(index, use_threads=False)
        except pa.ArrowException as error:
            raise SourceError(f"{file.path}: row group {index} is corrupt ({error})") from error
        return [_to_json(row) for row in table.take(pa.array(inside)).to_pylist()]
    group = file.row_groups[index]
    if file.compression is None:
        chunk = fs.cat_file(name, start=group.offset_bytes, end=group.offset_bytes + group.length_bytes)
    else:  # no seeking in a compressed stream: read up to the group
        with fs.open(name, "rb", compression=file.compression) as stream:
            remaining = group.offset_bytes
            while remaining:
                remaining -= len(stream.read(min(remaining, 1 << 20)))
            chunk = stream.read(group.length_bytes)
    rows = split_rows(chunk, group.num_rows, is_array=file.format == "array")
    return [rows[i] for i in inside]


def _to_json(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, allow_nan=False).encode()
    except (TypeError, ValueError):
        return json.dumps(_plain(row)).encode()


def _plain(value: Any) -> Any:
    """The same value with what JSON cannot say put into words: dates and numbers as text, NaN as null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if value is None or isinstance(value, (str, int)) else str(value)
