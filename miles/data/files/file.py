"""One file of a source: its format, size, stamp and row groups.

    a.parquet      3 row groups of 1000, 1000, 418 rows     from its footer
    b.jsonl.gz     1 row group of 3 rows, bytes 0 to 181    from one scan, which `json_index` keeps

A `File` describes a file as it was when the manifest was built. A file that has changed since is
refused by its size and stamp.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace

from miles.common import storage
from miles.data.file_formats import format_of
from miles.data.files import arrow_ipc, json_index, parquet
from miles.data.files.arrow_columns import Columns
from miles.errors import SourceError

TABLES = ("parquet", "arrow")
"""Formats whose columns have types."""
CSV = ("csv", "tsv")


@dataclass(frozen=True)
class RowGroup:
    """Rows that are read together."""

    num_rows: int
    offset_bytes: int
    """Its first byte in the decompressed file. 0 for Parquet, whose footer has the places."""
    length_bytes: int
    """0 for Parquet."""


@dataclass(frozen=True)
class File:
    """One file, as it was when the manifest was built."""

    path: str
    """fsspec URL"""
    format: str
    """"parquet", "arrow", "jsonl", "json" (values that are found by a scan, such as an array's
    elements), "csv" or "tsv\""""
    compression: str | None
    """None, "gzip", "zstd", "bz2" or "xz\""""
    size_bytes: int
    stamp: str
    """The filesystem's entity tag, or the time of the last change."""
    row_groups: tuple[RowGroup, ...]
    unread_columns: tuple[str, ...] = ()
    """Columns of a table that are not read: their values have no place in JSON. Bytes among the
    columns that are read are text."""

    @property
    def num_rows(self) -> int:
        return sum(group.num_rows for group in self.row_groups)

    @property
    def columns(self) -> Columns:
        """The columns of a table. The file is asked, where it was not lately."""
        place = self.path, self.size_bytes, self.stamp
        if self.format == "parquet":
            return parquet.footer(*place).columns
        return arrow_ipc.layout(*place).columns


def describe_file(url: str) -> File:
    """Return a file's entry in the manifest, as if no column of bytes were needed.

    Raises:
        SourceError: the file is missing, unreadable, corrupt or of an unknown format.
    """
    kind, compression = format_of(url)
    size_bytes, stamp = _size_and_stamp(url)

    if kind == "parquet":
        footer = parquet.footer(url, size_bytes, stamp)
        extents = [
            (footer.metadata.row_group(number).num_rows, 0, 0)
            for number in range(footer.metadata.num_row_groups)
        ]
    else:
        kind, extents = json_index.extents(url, kind, compression, size_bytes, stamp)

    groups = tuple(RowGroup(*extent) for extent in extents)
    file = File(url, kind, compression, size_bytes, stamp, groups)
    return replace(file, unread_columns=file.columns.unread) if kind in TABLES else file


def with_text_columns(file: File, needed: Set[str], named: Set[str]) -> File:
    """Return a file of which those columns of bytes are read, as text, that fields may be in.

    Args:
        file: as `describe_file` returned it.
        needed: names of columns where fields of the rows are looked for.
        named: those among them that the user named.

    Raises:
        SourceError: a column that the user named has no place in JSON.
    """
    if not file.unread_columns:
        return file
    file.columns.require_readable(file.path, named | {name.split(".")[0] for name in named})

    may_be_text = set(file.columns.binary)
    unread = []
    for name in file.columns.unread:
        is_needed = name in needed or name.lower() in needed
        if not (is_needed and name in may_be_text):
            unread.append(name)
    return replace(file, unread_columns=tuple(unread))


def describe_unread(file: File) -> str:
    """Return a sentence on the columns of a file that are not read."""
    columns = file.columns
    reasons = columns.no_json | columns.binary
    parts = [f"{name} ({reasons[name]})" for name in columns.unread]
    return f"Of {file.path} not read, since JSON has no place for it: {', '.join(parts)}"


def require_unchanged(file: File) -> None:
    """Refuse a file that has been written since its rows were counted.

    Raises:
        SourceError: the file has changed, is gone, or cannot be read.
    """
    if (file.size_bytes, file.stamp) != _size_and_stamp(file.path):
        raise SourceError(
            f"{file.path}: changed since its rows were counted "
            f"(was {file.size_bytes} bytes, {file.stamp}). A run reads the files that it began "
            "with: bring the old file back, or start anew with another --save"
        )


def _size_and_stamp(url: str) -> tuple[int, str]:
    """Return a file's size in bytes and its stamp.

    Raises:
        SourceError: the file is missing or unreadable.
    """
    with storage.reading(url):
        info = storage.info(url)
        return storage.size_of(url, info), storage.stamp_of(info)
