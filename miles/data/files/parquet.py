"""Parquet files: their footers, kept while a process lives, and row groups read by byte ranges.

    footer(url, size, stamp)                 -> FileMetaData     kept for the last 64 files
    group_batches(url, size, stamp, group)   -> record batches   of one row group, bounded memory

A column that has no place in a JSON object is refused when the footer is read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from miles.common import storage
from miles.common.file_errors import in_own_words
from miles.data.files import contents
from miles.errors import SourceError

BATCH_ROWS = 1_000
BATCH_BYTES = 32 << 20
"""Decoded, on average: a batch has fewer rows where they are long."""
WHOLE_GROUP_BYTES = 32 << 20
"""A row group up to this size is fetched in one request or few; a larger one is streamed."""
STREAM_BUFFER_BYTES = 4 << 20
"""Bytes that are fetched at once of each column of a row group that is streamed."""

_FOOTERS = 64
_locks = [threading.Lock() for _ in range(_FOOTERS)]

_IS_PLAIN = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_null,
    pa.types.is_date,
    pa.types.is_time,
    pa.types.is_timestamp,
    pa.types.is_duration,
    pa.types.is_struct,
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)
"""Tests for the types whose values have a place in a JSON object."""


def footer(url: str, size_bytes: int, stamp: str) -> Any:
    """Return a file's `pyarrow.parquet.FileMetaData`.

    Args:
        size_bytes, stamp: the file's, as its `File` has them. Without a stamp nothing is kept.

    Raises:
        SourceError: the file is missing, unreadable or no Parquet; or a column has no place in a
            JSON object: it is not text, numbers, booleans, dates, structs or lists of them, or
            shares its name with another.
    """
    if not stamp:
        return _read_footer(url, size_bytes, stamp)
    with _locks[hash(url) % len(_locks)]:  # several threads may want one file: the first fetches it
        return _kept_footer(url, size_bytes, stamp)


def _read_footer(url: str, size_bytes: int, stamp: str) -> Any:
    with storage.reading(url):
        try:
            file = pq.ParquetFile(storage.RangeFile(url, size_bytes))
        except (pa.ArrowInvalid, OSError) as error:
            # A footer that is cut or junk; other errors are the disk's, or a schema's of its own.
            is_footer = type(error) is OSError and "thrift" in str(error)
            if type(error) is not pa.ArrowInvalid and not is_footer:
                raise
            head = storage.RangeFile(url, size_bytes).read(contents.HEAD_BYTES)
            contents.require_parquet(url, head)
            raise SourceError(
                f"{url}: cannot be read: not a Parquet file, or cut off ({size_bytes:,} bytes). "
                f"Copy or write it again. The library says {in_own_words(error)}"
            ) from error
        _require_readable(url, file.schema_arrow)
        return file.metadata


_kept_footer = lru_cache(maxsize=_FOOTERS)(_read_footer)


def open_file(url: str, size_bytes: int, stamp: str, *, buffer_bytes: int = 0) -> pq.ParquetFile:
    """Open a file for reading.

    Args:
        size_bytes, stamp: as for `footer`.
        buffer_bytes: fetched of a column at once; 0: all columns of a row group are fetched
            together.
    """
    return pq.ParquetFile(
        storage.RangeFile(url, size_bytes),
        metadata=footer(url, size_bytes, stamp),
        pre_buffer=not buffer_bytes,
        buffer_size=buffer_bytes,
    )


def group_batches(url: str, size_bytes: int, stamp: str, group: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of one row group, in order and in bounded memory.

    The row group is read only as far as it is iterated.

    Args:
        size_bytes, stamp: as for `footer`.
        group: its number within the file.
    """
    metadata = footer(url, size_bytes, stamp).row_group(group)
    stored_bytes = sum(
        metadata.column(number).total_compressed_size for number in range(metadata.num_columns)
    )
    buffer_bytes = STREAM_BUFFER_BYTES if stored_bytes > WHOLE_GROUP_BYTES else 0

    rows_that_fit = BATCH_BYTES * metadata.num_rows // max(metadata.total_byte_size, 1)
    batch_rows = max(1, min(BATCH_ROWS, rows_that_fit))

    file = open_file(url, size_bytes, stamp, buffer_bytes=buffer_bytes)
    # One thread: the loader's share of the machine is an explicit number of processes.
    yield from file.iter_batches(batch_rows, row_groups=[group], use_threads=False)


def _require_readable(url: str, schema: pa.Schema) -> None:
    """Refuse columns that have no place in a JSON object.

    Raises:
        SourceError: there is one; the error names it and says how to write it instead.
    """
    repeated = _first_repeated(schema.names)
    if repeated is not None:
        raise SourceError(
            f"{url}: two columns are called {repeated!r}, and a row has one value of a name. "
            "Rename one of them"
        )
    for column in schema:
        for part in _parts(column):
            _require_readable_part(url, column, part)


def _require_readable_part(url: str, column: pa.Field, part: pa.Field) -> None:
    """Refuse a field, nested in a column or the column itself, whose type is not read."""
    name = f"column {column.name!r}"
    is_extension = isinstance(part.type, pa.BaseExtensionType)
    if is_extension or b"ARROW:extension:name" in (part.metadata or {}):
        raise SourceError(
            f"{url}: {name} is of an Arrow extension type ({part.type}), which is not read: such "
            "types can run code when they are loaded. Write the column as plain Arrow data"
        )

    if pa.types.is_map(part.type):
        raise SourceError(
            f"{url}: {name} is of type {column.type}, and a map is no JSON object: its keys need "
            "not be text, nor differ. Write it as a struct, a list of pairs, or JSON text"
        )

    if not _is_plain(part.type):
        raise SourceError(
            f"{url}: {name} is of type {column.type}; expected text, numbers, booleans, dates, "
            "structs or lists of them. The content of bytes (an image, a pickled object) is never "
            "loaded: leave the column out"
        )

    if pa.types.is_struct(part.type):
        repeated = _first_repeated([inner.name for inner in part.type])
        if repeated is not None:
            raise SourceError(
                f"{url}: two fields of {name} are called {repeated!r}, and a row has one value of "
                "a name. Rename one"
            )


def _is_plain(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    return any(is_kind(kind) for is_kind in _IS_PLAIN)


def _parts(field: pa.Field) -> Iterator[pa.Field]:
    """Yield a field and all that are nested in it."""
    yield field
    for number in range(field.type.num_fields):
        yield from _parts(field.type.field(number))


def _first_repeated(names: Sequence[str]) -> str | None:
    """Return the first name that occurs again."""
    return next((name for number, name in enumerate(names) if name in names[:number]), None)
