"""Row ids -> rows, reading only the row groups that hold them.

    [2418, 7, 1002]  ->  [b'{"messages": …}', b'{"conversations": …}', …]   in the order asked
    ascending ids    ->  lists of rows, as they are read, in bounded memory

The rows of a JSON file are returned as the bytes that they are; `normalize` judges whether they are
JSON. The rows of CSV and of tables become JSON (`csv_rows`, `row_json`); for the stream, most rows
of tables stay in Arrow (`plain_rows`). All columns are read that have a place in JSON, not only the
ones that `normalize` looks at: a text that is not UTF-8 rejects its row, whichever column it is in.

Of a remote set several pieces are fetched at a time: a window of a shuffled epoch touches dozens of
files, and each costs a few requests that one waits for.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from miles.common import storage
from miles.common.offsets import offsets_of
from miles.data.config import RowFormat
from miles.data.files.file import TABLES, File, require_unchanged
from miles.data.files.json_blocks import json_blocks, rows_of_block
from miles.data.files.manifest import Manifest
from miles.data.files.raw_rows import RawRows, joined, json_rows
from miles.data.files.table_rows import table_rows, wrong_count
from miles.data.types import Int64

READ_THREADS = 8
AHEAD_ROWS = 4_000
"""A piece of more rows is not fetched ahead of those before it, but streamed in its turn."""


@dataclass
class _Piece:
    """Rows that are read together: of one row group, or of all row groups of a compressed file."""

    file: File
    format: RowFormat | None
    """of the source; None: its rows are wanted as JSON"""
    groups: list[int]
    """row groups, numbers within the file, ascending"""
    wanted: list[Int64]
    """for each row group, int64 [rows]: numbers within the group, ascending"""
    is_first: bool
    """of the file's pieces: before it the file is checked for changes"""
    is_last: bool = True
    """of the file's pieces: after it the file is checked again"""

    @property
    def num_rows(self) -> int:
        return sum(len(rows) for rows in self.wanted)


def read_rows(manifest: Manifest, row_ids: Int64) -> list[bytes]:
    """Read rows.

    Args:
        manifest: as it was built; a file that has changed since is refused.
        row_ids: int64 [rows], in any order.

    Returns:
        Each row as JSON text (UTF-8), in the order asked.

    Raises:
        SourceError: a file is gone, has changed or cannot be read; the error names it.
    """
    row_ids = np.asarray(row_ids, dtype=np.int64)
    by_position = np.argsort(row_ids, kind="stable")
    pieces = _pieces(manifest, row_ids[by_position], as_json=True)

    payloads: list[bytes] = [b""] * len(row_ids)
    parts = _read(pieces, ahead_rows=len(row_ids))
    rows = itertools.chain.from_iterable(part.payloads.to_pylist() for part in parts)
    for position, row in zip(by_position.tolist(), rows, strict=True):
        payloads[position] = row
    return payloads


def stream_rows(manifest: Manifest, row_ids: Int64) -> Iterator[list[bytes]]:
    """Read rows in file order: as `read_rows`, a few at a time.

    Each row group is read once, however large it is.

    Args:
        row_ids: int64 [rows], ascending.
    """
    for part in _read(_pieces(manifest, row_ids, as_json=True), AHEAD_ROWS):
        yield part.payloads.to_pylist()


def read_raw_rows(manifest: Manifest, row_ids: Int64, counts: Sequence[int]) -> Iterator[RawRows]:
    """Return rows in Arrow, in the order asked, divided into parts.

    Ascending rows are read as the parts are taken, others at once.

    Args:
        manifest, row_ids: as for `read_rows`.
        counts: the number of rows of each part.

    Raises:
        SourceError: as from `read_rows`.
    """
    row_ids = np.asarray(row_ids, dtype=np.int64)
    if (np.diff(row_ids) > 0).all():
        return _divided(_read(_pieces(manifest, row_ids), AHEAD_ROWS), counts)

    by_position = np.argsort(row_ids, kind="stable")
    pieces = _pieces(manifest, row_ids[by_position])
    rows = joined(list(_read(pieces, ahead_rows=len(row_ids))))
    places = np.argsort(by_position, kind="stable")
    return (rows.take(places[begin:end]) for begin, end in itertools.pairwise(offsets_of(counts)))


def _divided(parts: Iterator[RawRows], counts: Sequence[int]) -> Iterator[RawRows]:
    """Yield rows in parts of other sizes."""
    read: list[RawRows] = []
    for count in counts:
        while sum(map(len, read)) < count:
            read.append(next(parts))
        rows = joined(read)
        yield rows.slice(0, count)
        read = [rows.slice(count, len(rows) - count)]


def _pieces(manifest: Manifest, row_ids: Int64, *, as_json: bool = False) -> list[_Piece]:
    """Return the pieces that hold ascending rows, in the same order."""
    assert len(row_ids) == 0 or (row_ids[0] >= 0 and row_ids[-1] < manifest.num_rows), "no such row"
    group_of_row = np.searchsorted(manifest.group_starts, row_ids, side="right") - 1
    groups, begins = np.unique(group_of_row, return_index=True)
    ends = np.append(begins, len(row_ids))[1:]

    pieces: list[_Piece] = []
    for group, begin, end in zip(groups.tolist(), begins.tolist(), ends.tolist(), strict=True):
        source_id, file, number = manifest.group_location(group)
        format: RowFormat | None = manifest.sources[source_id].format
        if as_json or (format and format.transform):  # the function is given JSON
            format = None
        wanted = row_ids[begin:end] - manifest.group_starts[group]

        previous = pieces[-1] if pieces and pieces[-1].file is file else None
        if previous is None:
            pieces.append(_Piece(file, format, [number], [wanted], is_first=True))
        elif file.compression is None:
            previous.is_last = False
            pieces.append(_Piece(file, format, [number], [wanted], is_first=False))
        else:
            previous.groups.append(number)
            previous.wanted.append(wanted)
    return pieces


def _read(pieces: list[_Piece], ahead_rows: int) -> Iterator[RawRows]:
    """Yield the wanted rows of all pieces, in order.

    Args:
        ahead_rows: remote pieces of up to this many rows are fetched ahead, by threads.
    """
    urls = {piece.file.path for piece in pieces}
    if all(map(storage.is_local, urls)):
        for piece in pieces:
            yield from _read_piece(piece)
    else:
        yield from _read_ahead(pieces, ahead_rows)


def _read_ahead(pieces: list[_Piece], ahead_rows: int) -> Iterator[RawRows]:
    waiting: deque[Iterable[RawRows] | Future[list[RawRows]]] = deque()
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="miles-read") as pool:
        try:
            for piece in pieces:
                is_small = piece.num_rows <= ahead_rows
                waiting.append(
                    pool.submit(_read_at_once, piece) if is_small else _read_piece(piece)
                )
                if len(waiting) > 2 * READ_THREADS:
                    yield from _result(waiting.popleft())

            while waiting:
                yield from _result(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _result(piece: Iterable[RawRows] | Future[list[RawRows]]) -> Iterable[RawRows]:
    return piece.result() if isinstance(piece, Future) else piece


def _read_at_once(piece: _Piece) -> list[RawRows]:
    return list(_read_piece(piece))


def _read_piece(piece: _Piece) -> Iterator[RawRows]:
    """Yield a piece's wanted rows, a few at a time."""
    if piece.is_first:
        require_unchanged(piece.file)

    with storage.reading(piece.file.path):
        if piece.file.format in TABLES:
            for group, wanted in zip(piece.groups, piece.wanted, strict=True):
                yield from table_rows(piece.file, group, wanted, piece.format)
        else:
            yield from _text_rows(piece)

    if piece.is_last:
        require_unchanged(piece.file)


def _text_rows(piece: _Piece) -> Iterator[RawRows]:
    """Yield the wanted rows of each row group of a JSON or CSV file."""
    file = piece.file
    groups = [file.row_groups[number] for number in piece.groups]

    for number, block, wanted in zip(
        piece.groups, json_blocks(file, groups), piece.wanted, strict=True
    ):
        try:
            rows = rows_of_block(file, block)
        except (ValueError, RecursionError):  # they were JSON when they were counted
            rows = []
        if len(rows) != file.row_groups[number].num_rows:
            raise wrong_count(file, number)
        yield json_rows([rows[row] for row in wanted])
