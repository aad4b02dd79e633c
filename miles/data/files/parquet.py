"""Parquet files: their footers, kept while a process lives, and row groups read by byte ranges.

    footer(url, size, stamp)                 -> Footer           kept for the last 64 files
    group_batches(url, size, stamp, group)   -> record batches   of one row group, bounded memory

A column that could run code, or that shares its name, is refused when the footer is read.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq

from miles.common import storage
from miles.common.file_errors import in_own_words
from miles.data.files import contents
from miles.data.files.arrow_columns import Columns, columns_of
from miles.errors import SourceError

BATCH_ROWS = 1_000
BATCH_BYTES = 32 << 20
"""Decoded, on average: a batch has fewer rows where they are long."""
WHOLE_GROUP_BYTES = 32 << 20
"""A row group up to this size is fetched in one request or few; a larger one is streamed."""
STREAM_BUFFER_BYTES = 4 << 20
"""Bytes that are fetched at once of each column of a row group that is streamed."""
FIRST_BUFFER_BYTES = 1 << 20
"""The same, where a few rows are wanted."""

_FOOTERS = 64
_MAGIC_BYTES = 4
_SIGNATURE_BYTES = 28
"""A nonce of 12 and a tag of 16 bytes, as Parquet's encryption has them."""
_locks = [threading.Lock() for _ in range(_FOOTERS)]


@dataclass(frozen=True)
class Footer:
    """The footer of a file."""

    metadata: pq.FileMetaData
    columns: Columns


def footer(url: str, size_bytes: int, stamp: str) -> Footer:
    """Return a file's footer.

    Args:
        size_bytes, stamp: the file's, as its `File` has them. Without a stamp nothing is kept.

    Raises:
        SourceError: the file is missing, unreadable or no Parquet; or a column is of an extension
            type that could run code, or shares its name with another.
    """
    if not stamp:
        return _read_footer(url, size_bytes, stamp)
    with _locks[hash(url) % len(_locks)]:  # several threads may want one file: the first fetches it
        return _kept_footer(url, size_bytes, stamp)


def _read_footer(url: str, size_bytes: int, stamp: str) -> Footer:
    with storage.reading(url):
        tail = _Tail(url, size_bytes)
        try:
            file = pq.ParquetFile(tail)
        except (pa.ArrowInvalid, OSError) as error:
            # A footer that is cut or junk; other errors are the disk's, or a schema's of its own.
            is_footer = type(error) is OSError and "thrift" in str(error)
            if type(error) is OSError and "encrypted" in str(error):
                raise _encrypted(url) from error
            if type(error) is not pa.ArrowInvalid and not is_footer:
                raise

            head = storage.RangeFile(url, size_bytes).read(contents.HEAD_BYTES)
            contents.require_parquet(url, head)
            raise SourceError(
                f"{url}: cannot be read: not a Parquet file, or cut off ({size_bytes:,} bytes). "
                f"Copy or write it again. The library says {in_own_words(error)}"
            ) from error

        # pyarrow (26.0) aborts the process when it is asked about an encrypted column. A footer in
        # plain text is signed where there is one.
        if tail.footer_bytes == file.metadata.serialized_size + _SIGNATURE_BYTES:
            raise _encrypted(url)
        return Footer(file.metadata, columns_of(url, file.schema_arrow))


class _Tail(storage.RangeFile):
    """A file of which the last bytes are kept when they are read."""

    footer_bytes = 0
    """The length of the footer, as the file has it: 4 bytes before its last 4."""

    def read_range(self, begin: int, end: int) -> bytes:
        """Return bytes [begin, end)."""
        content = super().read_range(begin, end)
        if end == self._num_bytes and len(content) >= 2 * _MAGIC_BYTES:
            self.footer_bytes = int.from_bytes(content[-2 * _MAGIC_BYTES : -_MAGIC_BYTES], "little")
        return content


def _encrypted(url: str) -> SourceError:
    return SourceError(
        f"{url}: an encrypted Parquet file, and there is no key for it. Write it again without "
        "encryption"
    )


_kept_footer = lru_cache(maxsize=_FOOTERS)(_read_footer)


def _open(url: str, size_bytes: int, stamp: str, *, buffer_bytes: int = 0) -> pq.ParquetFile:
    """Open a file for reading.

    Args:
        size_bytes, stamp: as for `footer`.
        buffer_bytes: fetched of a column at once; 0: all columns of a row group are fetched
            together.
    """
    return pq.ParquetFile(
        storage.RangeFile(url, size_bytes),
        metadata=footer(url, size_bytes, stamp).metadata,
        pre_buffer=not buffer_bytes,
        buffer_size=buffer_bytes,
    )


def group_batches(
    url: str,
    size_bytes: int,
    stamp: str,
    group: int,
    unread: Collection[str] = (),
    num_rows: int | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of one row group, in order and in bounded memory.

    The row group is read only as far as it is iterated.

    Args:
        size_bytes, stamp: as for `footer`.
        group: its number within the file.
        unread: columns that are left out.
        num_rows: no more will be asked for; None: all will.
    """
    kept = footer(url, size_bytes, stamp)
    metadata = kept.metadata.row_group(group)
    stored_bytes = sum(
        metadata.column(number).total_compressed_size for number in range(metadata.num_columns)
    )
    buffer_bytes = STREAM_BUFFER_BYTES if stored_bytes > WHOLE_GROUP_BYTES else 0
    if num_rows is not None:
        buffer_bytes = FIRST_BUFFER_BYTES

    rows_that_fit = BATCH_BYTES * metadata.num_rows // max(metadata.total_byte_size, 1)
    batch_rows = max(1, min(num_rows or BATCH_ROWS, rows_that_fit))

    file = _open(url, size_bytes, stamp, buffer_bytes=buffer_bytes)
    columns = [name for name in kept.columns.names if name not in unread] if unread else None
    # One thread: the loader's share of the machine is an explicit number of processes.
    for batch in file.iter_batches(
        batch_rows, row_groups=[group], columns=columns, use_threads=False
    ):
        # "a" brings a column called "a.b" along.
        yield batch if columns is None else batch.select(columns)
