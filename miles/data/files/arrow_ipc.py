"""Arrow IPC files and streams: their record batches, found by the messages' heads.

    "ARROW1\\0\\0"          only in a file, not in a stream
    schema                 a message: length, head (a flatbuffer), body
    dictionaries           messages
    record batches         messages; each with rows is a row group
    footer, "ARROW1"       only in a file

Bodies are not read to find them. To read one, a stream is made of the schema, the dictionaries
before it and the batch: both formats are read alike, by ranges. `datasets` saves streams; Feather
(version 2) and `.arrow` of others are files.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

import pyarrow as pa

from miles.common import storage
from miles.common.file_errors import in_own_words
from miles.data.files import contents
from miles.data.files.arrow_columns import Columns, columns_of
from miles.data.files.arrow_types import is_valid
from miles.data.files.json_scan import Extent
from miles.errors import SourceError

BATCH_ROWS = 1_000
"""A record batch is handed out in slices of so many rows."""
MAX_BATCH_BYTES = 1 << 30
"""A record batch is read as a whole: one with more bytes is refused."""

_MAGIC = b"ARROW1"
_FEATHER_1 = b"FEA1"
_FILE_START = 8
_BUFFER_BYTES = 256 << 10
"""Fetched at once while heads are looked for."""
_MAX_HEAD_BYTES = 64 << 20
_NO_MORE = 0
_CONTINUATION = 0xFFFFFFFF

_SCHEMA = 1
_DICTIONARY = 2
_RECORD_BATCH = 3
"""Kinds of messages, as the format numbers them."""


@dataclass(frozen=True)
class _Message:
    """A message of a stream, without its body."""

    kind: int
    num_rows: int
    """of a record batch; else 0"""
    offset_bytes: int
    length_bytes: int
    """with head and body"""


@dataclass(frozen=True)
class Layout:
    """The schema of a file, which precedes its record batches."""

    schema_message: bytes
    schema: pa.Schema
    columns: Columns
    has_dictionaries: bool


def scan(url: str, size_bytes: int) -> list[Extent]:
    """Find the record batches of a file or stream that have rows.

    Raises:
        SourceError: it is cut off, no Arrow IPC, or has a batch that is too large.
    """
    extents: list[Extent] = []
    for message in _messages(url, size_bytes):
        if message.length_bytes > MAX_BATCH_BYTES:
            raise SourceError(
                f"{url}: the record batch at byte {message.offset_bytes:,} has "
                f"{message.length_bytes:,} bytes, and is only read as a whole: at most "
                f"{MAX_BATCH_BYTES:,} are. Write the file again in smaller batches (with pyarrow, "
                "write_table(TABLE, max_chunksize=1000)), or as Parquet, or JSON lines"
            )
        if message.kind == _RECORD_BATCH and message.num_rows:
            extents.append((message.num_rows, message.offset_bytes, message.length_bytes))
    return extents


def layout(url: str, size_bytes: int, stamp: str) -> Layout:
    """Return a file's schema, kept for the last 64 files that have a stamp.

    Raises:
        SourceError: the file is missing, unreadable or no Arrow IPC; or a column is of an extension
            type that could run code, or shares its name.
    """
    return (_kept_layout if stamp else _read_layout)(url, size_bytes, stamp)


def _read_layout(url: str, size_bytes: int, stamp: str) -> Layout:
    first = next(_messages(url, size_bytes), None)
    if first is None or first.kind != _SCHEMA:
        raise _broken(url, size_bytes, "it does not begin with a schema")
    content = _read(url, size_bytes, first)
    with storage.reading(url):
        try:
            schema = pa.ipc.read_schema(pa.py_buffer(content))
            columns = columns_of(url, schema)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise _broken(url, size_bytes, f"the library says {in_own_words(error)}") from error
    return Layout(content, schema, columns, any(map(_has_dictionary, schema)))


_kept_layout = lru_cache(maxsize=64)(_read_layout)


def group_batches(
    url: str, size_bytes: int, stamp: str, place: tuple[int, int], unread: Collection[str] = ()
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a record batch, a few at a time.

    Args:
        place: the batch's offset and length in bytes, as `scan` found them.
        unread: columns that are left out.
    """
    kept = layout(url, size_bytes, stamp)
    offset, length = place
    parts = [kept.schema_message]
    if kept.has_dictionaries:
        for message in _kept_dictionaries(url, size_bytes, stamp):
            if message.offset_bytes < offset:
                parts.append(_read(url, size_bytes, message))
    parts.append(storage.RangeFile(url, size_bytes).read_range(offset, offset + length))

    wanted = [number for number, name in enumerate(kept.columns.names) if name not in unread]
    options = pa.ipc.IpcReadOptions(included_fields=wanted if unread else None, use_threads=False)
    with pa.ipc.open_stream(pa.py_buffer(b"".join(parts)), options=options) as reader:
        batch = reader.read_next_batch()
    if not wanted:  # an empty list includes all fields
        batch = batch.select([])
    yield from _valid(batch)


def _valid(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a batch, a few at a time, none with offsets that lead outside of it.

    A row that is not valid, such as one with text that is not UTF-8, is given as one that cannot be
    read.
    """
    for begin in range(0, batch.num_rows, BATCH_ROWS):
        part = batch.slice(begin, BATCH_ROWS)
        if is_valid(part):
            yield part
            continue
        for number in range(part.num_rows):
            row = part.slice(number, 1)
            yield row if is_valid(row) else _unreadable_row()


@cache
def _unreadable_row() -> pa.RecordBatch:
    """Return a row that is not UTF-8. pyarrow imports pandas to make an array, so not at import."""
    return pa.record_batch({"": pa.array([b"\xff"])})


@lru_cache(maxsize=64)
def _kept_dictionaries(url: str, size_bytes: int, stamp: str) -> tuple[_Message, ...]:
    messages = _messages(url, size_bytes)
    return tuple(message for message in messages if message.kind == _DICTIONARY)


def _has_dictionary(column: pa.Field) -> bool:
    if pa.types.is_dictionary(column.type):
        return True
    kind = column.type
    return any(_has_dictionary(kind.field(number)) for number in range(kind.num_fields))


def _read(url: str, size_bytes: int, message: _Message) -> bytes:
    end = message.offset_bytes + message.length_bytes
    return storage.RangeFile(url, size_bytes).read_range(message.offset_bytes, end)


def _messages(url: str, size_bytes: int) -> Iterator[_Message]:
    """Yield the messages of a file or stream, in order.

    Raises:
        SourceError: it ends within one, or is no Arrow IPC.
    """
    content = io.BufferedReader(storage.RangeFile(url, size_bytes), _BUFFER_BYTES)
    at = _start(url, size_bytes)
    while at < size_bytes:
        content.seek(at)
        (num_bytes,) = _unpacked("<I", content.read(4), url, size_bytes)
        prefix_bytes = 4
        if num_bytes == _CONTINUATION:  # since Arrow 0.15
            (num_bytes,) = _unpacked("<I", content.read(4), url, size_bytes)
            prefix_bytes = 8
        if num_bytes == _NO_MORE:
            return
        if num_bytes > _MAX_HEAD_BYTES:
            raise _broken(url, size_bytes, f"at byte {at:,} there is no message")

        head = content.read(num_bytes)
        if len(head) < num_bytes:
            raise _broken(url, size_bytes, "it ends within a message")
        try:
            kind, num_rows, body_bytes = _head(head)
        except (struct.error, IndexError) as error:
            raise _broken(url, size_bytes, f"at byte {at:,} there is no message") from error

        length = prefix_bytes + num_bytes + body_bytes
        if body_bytes < 0 or num_rows < 0 or at + length > size_bytes:
            raise _broken(url, size_bytes, f"the message at byte {at:,} goes beyond its end")
        yield _Message(kind, num_rows, at, length)
        at += length


def _start(url: str, size_bytes: int) -> int:
    """Return where the first message of a file or stream begins.

    Raises:
        SourceError: it is cut off, or of an older format.
    """
    content = storage.RangeFile(url, size_bytes)
    head = content.read_range(0, min(contents.HEAD_BYTES, size_bytes))
    contents.require_arrow(url, head)
    if head.startswith(_FEATHER_1):
        raise SourceError(
            f"{url}: Feather of version 1, which is not read. Write it again: with pandas, "
            "pandas.read_feather(OLD).to_feather(NEW)"
        )

    if not head.startswith(_MAGIC):
        return 0
    if content.read_range(max(size_bytes - len(_MAGIC), 0), size_bytes) != _MAGIC:
        raise _broken(url, size_bytes, "its end is missing")
    return _FILE_START


def _head(head: bytes) -> tuple[int, int, int]:
    """Return the kind of a message, its number of rows, and the bytes of its body.

    The head is a flatbuffer: `Message(version, header_type, header, bodyLength)`, where the header
    of a record batch is `RecordBatch(length, …)`.
    """
    message = _Table(head, struct.unpack_from("<I", head)[0])
    kind = message.number(1, "<B")
    body_bytes = message.number(3, "<q")
    num_rows = message.table(2).number(0, "<q") if kind == _RECORD_BATCH else 0
    return kind, num_rows, body_bytes


class _Table:
    """A table of a flatbuffer, whose fields are found by their numbers."""

    def __init__(self, content: bytes, at: int) -> None:
        self._content = content
        self._at = at
        self._fields = at - struct.unpack_from("<i", content, at)[0]

    def number(self, field: int, layout: str) -> int:
        """Return a number; 0 where it is absent."""
        place = self._place(field)
        return int(struct.unpack_from(layout, self._content, place)[0]) if place else 0

    def table(self, field: int) -> _Table:
        """Return a table within this one."""
        place = self._place(field)
        return _Table(self._content, place + struct.unpack_from("<I", self._content, place)[0])

    def _place(self, field: int) -> int:
        (num_bytes,) = struct.unpack_from("<H", self._content, self._fields)
        entry = 4 + 2 * field
        if entry >= num_bytes:
            return 0
        (offset,) = struct.unpack_from("<H", self._content, self._fields + entry)
        return self._at + offset if offset else 0


def _unpacked(layout: str, content: bytes, url: str, size_bytes: int) -> tuple[int, ...]:
    if len(content) < struct.calcsize(layout):
        raise _broken(url, size_bytes, "it ends within a message")
    return struct.unpack(layout, content)


def _broken(url: str, size_bytes: int, cause: str) -> SourceError:
    return SourceError(
        f"{url}: cannot be read: not an Arrow IPC file or stream, or cut off ({size_bytes:,} "
        f"bytes): {cause}. Copy or write it again"
    )
