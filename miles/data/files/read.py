"""Row ids -> rows as JSON text, reading only the row groups that hold them.

    [2418, 7, 1002]  ->  [b'{"messages": …}', b'{"conversations": …}', …]   in the order asked
    ids that ascend  ->  lists of rows, as they are read, in bounded memory

A JSON file's rows are handed through as the bytes that they are: whether they are JSON, `normalize` judges.
Parquet's rows become JSON: dates in ISO 8601, decimals as text, NaN as null. All columns are read, not only those
that `normalize` looks at: a value that is not text rejects its row, whichever column it is in.

Of a remote set several pieces are fetched at a time: a window of a shuffled epoch touches dozens of files, and
each costs a few requests that one waits for.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from miles.common import storage
from miles.data.files import json_scan, parquet
from miles.data.files.manifest import File, Manifest, file_stamp
from miles.data.types import Int64
from miles.errors import SourceError

UNREADABLE_ROW = b"\xff"
"""Stands for a Parquet row that cannot be made text (a string that is not UTF-8): no JSON, so it is rejected."""
MAX_GROUP_WINDOWS = 4
"""A row group that fills more windows than this is not trained on: each of them would read it as a whole."""
SMALL_GROUP_ROWS = 1_000
"""A row group of no more is trained on whatever the window: `prepare` and the index of a JSON file make such ones."""
READ_THREADS = 8
AHEAD_ROWS = 4_000
"""A piece of more rows is not fetched ahead of those before it, but handed on while it is read."""


@dataclass(frozen=True)
class _Piece:
    """Rows that are read together: of one row group, or of all groups of a compressed file, which is read from its
    start."""

    file: File
    is_first: bool
    """of the file's pieces: before it the file is looked at again, and behind the last one"""
    is_last: bool
    groups: tuple[int, ...]
    """row groups, numbers within the file, ascending"""
    wanted: tuple[Int64, ...]
    """of each group, int64 [rows]: numbers within the group, ascending"""

    @property
    def num_rows(self) -> int:
        return sum(len(rows) for rows in self.wanted)


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
    by_position = np.argsort(row_ids, kind="stable")
    pieces = _pieces(manifest, row_ids[by_position])
    payloads: list[bytes] = [b""] * len(row_ids)
    rows = itertools.chain.from_iterable(_read(pieces, ahead_rows=len(row_ids)))
    for position, row in zip(by_position.tolist(), rows, strict=True):
        payloads[position] = row
    return payloads


def stream_rows(manifest: Manifest, row_ids: Int64) -> Iterator[list[bytes]]:
    """Reads rows of a file order: as `read_rows`, a few at a time, each row group once however large it is.

    Args:
        row_ids: int64 [rows], ascending.
    """
    return _read(_pieces(manifest, row_ids), AHEAD_ROWS)


def largest_read_rows(manifest: Manifest) -> int:
    """Rows of the largest row group, or of the largest compressed JSON file, which is read from its start."""
    return max(
        rows for source in manifest.sources for file in source.files for _, rows in _units(file)
    )


def require_small_groups(
    manifest: Manifest, window_rows: int, source_window_rows: Sequence[int] | None = None
) -> None:
    """Refuses a file whose rows would be read again for many windows.

    Args:
        source_window_rows: of each source of a weighted mixture, how many of its rows a window takes.

    Raises:
        SourceError: names the file, and what to do about it.
    """
    num_windows = -(-manifest.num_rows // window_rows)
    for source, own_rows in zip(
        manifest.sources, source_window_rows or [window_rows] * len(manifest.sources), strict=True
    ):
        for file in source.files:
            what, rows = max(_units(file), key=lambda unit: unit[1])
            if rows <= max(MAX_GROUP_WINDOWS * own_rows, SMALL_GROUP_ROWS):
                continue
            num_reads = (
                -(-rows // own_rows)
                if file.compression is None
                else min(num_windows, len(file.row_groups))
            )
            enough_rows = -(-rows * window_rows // (MAX_GROUP_WINDOWS * own_rows))
            raise SourceError(
                f"{file.path}: {what} has {rows:,} rows and can only be read as a whole, while a window has "
                f"{own_rows:,} of this source (--shuffle-window): it would be read about {num_reads} times an epoch, "
                f"and {MAX_GROUP_WINDOWS} windows are the limit. Rewrite the file once, `miles prepare {source.name} "
                f"--source {file.path} --tokenizer DIR --output FOLDER`, and train on FOLDER; or give a "
                f"--shuffle-window of {enough_rows:,} rows or more, which are held in memory together"
            )


def _units(file: File) -> Iterator[tuple[str, int]]:
    """What of a file can only be read from its start, and its rows."""
    if file.compression is not None:
        yield f"the {file.compression} file", file.num_rows
        return
    yield "the file", 0
    for number, group in enumerate(file.row_groups):
        yield f"row group {number}", group.num_rows


def _pieces(manifest: Manifest, row_ids: Int64) -> list[_Piece]:
    """The pieces that hold ascending rows, in the same order."""
    assert len(row_ids) == 0 or (row_ids[0] >= 0 and row_ids[-1] < manifest.num_rows), "no such row"
    groups, begins = np.unique(
        np.searchsorted(manifest.group_starts, row_ids, side="right") - 1, return_index=True
    )
    ends = np.append(begins, len(row_ids))[1:]
    pieces: list[_Piece] = []
    for group, begin, end in zip(groups.tolist(), begins.tolist(), ends.tolist(), strict=True):
        _, file, index = manifest.group_location(group)
        wanted = row_ids[begin:end] - manifest.group_starts[group]
        last = pieces[-1] if pieces and pieces[-1].file is file else None
        if last is not None and file.compression is not None:
            pieces[-1] = replace(last, groups=(*last.groups, index), wanted=(*last.wanted, wanted))
            continue
        if last is not None:
            pieces[-1] = replace(last, is_last=False)
        pieces.append(_Piece(file, last is None, True, (index,), (wanted,)))
    return pieces


def _read(pieces: list[_Piece], ahead_rows: int) -> Iterator[list[bytes]]:
    """The wanted rows of all pieces, in order; remote pieces of up to `ahead_rows` are fetched ahead, by threads."""
    if all(storage.is_local(url) for url in {piece.file.path for piece in pieces}):
        for piece in pieces:
            yield from _read_piece(piece)
        return
    waiting: deque[Iterable[list[bytes]] | Future[list[list[bytes]]]] = deque()
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="miles-read") as pool:
        try:
            for piece in pieces:
                is_small = piece.num_rows <= ahead_rows
                waiting.append(pool.submit(_read_whole, piece) if is_small else _read_piece(piece))
                if len(waiting) > 2 * READ_THREADS:
                    yield from _result(waiting.popleft())
            while waiting:
                yield from _result(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _result(piece: Iterable[list[bytes]] | Future[list[list[bytes]]]) -> Iterable[list[bytes]]:
    return piece.result() if isinstance(piece, Future) else piece


def _read_whole(piece: _Piece) -> list[list[bytes]]:
    return list(_read_piece(piece))


def _read_piece(piece: _Piece) -> Iterator[list[bytes]]:
    """A piece's wanted rows, a few at a time."""
    if piece.is_first:
        _require_unchanged(piece.file)
    yield from _rows_of(piece)
    if piece.is_last:
        _require_unchanged(piece.file)


def _require_unchanged(file: File) -> None:
    if (file.size_bytes, file.stamp) != file_stamp(file.path):
        raise SourceError(
            f"{file.path}: changed since its rows were counted (was {file.size_bytes} bytes, {file.stamp}). A run "
            "reads the files that it began with: bring the old file back, or start anew with another --save"
        )


def _rows_of(piece: _Piece) -> Iterator[list[bytes]]:
    file = piece.file
    with storage.reading(file.path):
        if file.format == "parquet":
            (group,), (wanted,) = piece.groups, piece.wanted
            yield from _parquet_rows(file, group, wanted)
            return
        for group, block, wanted in zip(
            piece.groups, _blocks(file, piece.groups), piece.wanted, strict=True
        ):
            lines = json_scan.split_rows(file.format, block)
            if len(lines) != file.row_groups[group].num_rows:
                raise SourceError(
                    f"{file.path}: row group {group} no longer holds the rows that were counted"
                )
            yield [lines[row] for row in wanted]


def _blocks(file: File, indices: tuple[int, ...]) -> Iterator[bytes]:
    """The bytes of a JSON file's row groups."""
    groups = [file.row_groups[index] for index in indices]
    if file.compression is None:
        ranges = storage.RangeFile(file.path, file.size_bytes)
        for group in groups:
            yield ranges.read_range(group.offset_bytes, group.offset_bytes + group.length_bytes)
        return
    chunks = json_scan.read_chunks(file.path, file.compression)
    buffer, base = b"", 0  # buffer[0] is byte `base` of the decompressed file
    for group in groups:
        end = group.offset_bytes + group.length_bytes
        while base + len(buffer) < end:
            passed = min(group.offset_bytes - base, len(buffer))
            chunk = next(chunks, None)
            if chunk is None:
                raise SourceError(f"{file.path}: ends before the rows that were counted do")
            buffer, base = buffer[passed:] + chunk, base + passed
        yield buffer[group.offset_bytes - base : end - base]


def _parquet_rows(file: File, group: int, wanted: Int64) -> Iterator[list[bytes]]:
    """The wanted rows (int64, numbers within the group, ascending) of a row group, which is read no further."""
    first = 0
    for batch in parquet.group_batches(file.path, file.size_bytes, file.stamp, group):
        begin, end = np.searchsorted(wanted, (first, first + batch.num_rows))
        if begin < end:
            rows = pa.array(wanted[begin:end] - first)
            yield _table_to_json(pa.Table.from_batches([batch]).take(rows))
        first += batch.num_rows
        if first > wanted[-1]:
            return
    raise SourceError(f"{file.path}: row group {group} no longer holds the rows that were counted")


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
        return orjson.dumps(
            row, default=_to_text, option=orjson.OPT_PASSTHROUGH_DATETIME
        )  # NaN becomes null
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


_ENCODER = json.JSONEncoder(
    ensure_ascii=True, allow_nan=False, check_circular=False, default=_to_text
)
