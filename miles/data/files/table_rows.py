"""Tables, Parquet or Arrow IPC: record batches of a row group, and its rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import pyarrow as pa

from miles.common.file_errors import in_own_words
from miles.data.config import RowFormat
from miles.data.files import arrow_ipc, parquet
from miles.data.files.file import File
from miles.data.files.media_columns import MEDIA, with_unread_media
from miles.data.files.plain_rows import raw_rows
from miles.data.files.raw_rows import RawRows, json_rows
from miles.data.files.row_json import rows_to_json
from miles.data.types import Int64
from miles.errors import SourceError


def table_rows(
    file: File, group: int, wanted: Int64, format: RowFormat | None
) -> Iterator[RawRows]:
    """Yield the wanted rows of a row group. It is read only as far as they go.

    Args:
        group: its number within the file.
        wanted: int64 [rows], numbers within the row group, ascending.
        format: of the source; None: all rows are wanted as JSON.

    Raises:
        SourceError: the row group is damaged, or has fewer rows than were counted.
    """
    first = 0
    for batch in batches(file, group, file.unread_columns):
        begin, end = np.searchsorted(wanted, (first, first + batch.num_rows))
        if begin < end:
            numbers = wanted[begin:end] - first
            if format is None or not MEDIA.keys().isdisjoint(file.unread_columns):
                rows = rows_to_json(batch, numbers)
                yield json_rows(with_unread_media(rows, file.unread_columns))
            else:
                yield raw_rows(batch, numbers, format)
        first += batch.num_rows
        if first > wanted[-1]:
            return
    raise wrong_count(file, group)


def first_batches(file: File, columns: Collection[str], num_rows: int) -> Iterator[pa.RecordBatch]:
    """Yield the first rows of a file that has rows. Of Parquet it is one batch.

    Args:
        columns: that are read.
        num_rows: as many, or fewer.

    Raises:
        SourceError: they cannot be read.
    """
    group = next(number for number, group in enumerate(file.row_groups) if group.num_rows)
    unread = [name for name in file.columns.names if name not in columns]
    num_left = num_rows
    for batch in batches(file, group, unread, num_rows):
        yield batch.slice(0, num_left)
        num_left -= batch.num_rows
        if num_left <= 0 or file.format == "parquet":
            return


def batches(
    file: File, group: int, unread: Collection[str], num_rows: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a row group, in order and in bounded memory.

    Args:
        group: its number within the file.
        unread: columns that are left out.
        num_rows: no more will be asked for; None: all will.

    Raises:
        SourceError: the row group is damaged.
    """
    place = file.path, file.size_bytes, file.stamp
    try:
        if file.format == "parquet":
            yield from parquet.group_batches(*place, group, unread, num_rows)
        else:
            at = file.row_groups[group]
            yield from arrow_ipc.group_batches(*place, (at.offset_bytes, at.length_bytes), unread)
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the disk's own
            raise

        begin = sum(other.num_rows for other in file.row_groups[:group])
        end = begin + file.row_groups[group].num_rows
        raise SourceError(
            f"{file.path}: row group {group} (rows {begin:,} to {end - 1:,} of the file, counting "
            f"from 0) cannot be read: it is damaged, or the file is cut off. Copy or write it "
            f"again. The library says {in_own_words(error)}"
        ) from error


def wrong_count(file: File, group: int) -> SourceError:
    """Return the error for a row group that has other rows than were counted."""
    return SourceError(
        f"{file.path}: row group {group} no longer holds the rows that were counted: the file was "
        "damaged or written anew since. Copy or bring back the file that was counted"
    )
