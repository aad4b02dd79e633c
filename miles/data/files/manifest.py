"""What there is to read: every file's row groups and row counts, in one fixed order.

    sources ──expand──► files ──footers / one scan──► row groups      id of a row = its position in
     a: x.parquet         x (1000, 1000, 418 rows)                    sources x files x rows order
     b: y.jsonl, z.json   y (3 rows)  z (2 rows)                      y's first row is row 2418

Of Parquet only the footers are read; a JSON file is scanned once, for byte offsets that are kept (`index`). Of
each source's first file the first rows are read, to tell what they look like (`formats`). The fingerprint is the
same wherever the files lie, and another one as soon as a file is added, renamed or written anew, or rows are read
otherwise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from miles.common import storage
from miles.common.offsets import offsets_of
from miles.data.config import RowFormat, SourceConfig
from miles.data.files import json_index, json_scan, parquet
from miles.data.files.locate import FORMATS, format_of
from miles.data.files.row_shapes import FIRST_ROWS, detect_format, find_columns, known_columns
from miles.data.types import Int32, Int64
from miles.errors import ConfigError, SourceError

MANIFEST_VERSION = 2
_FOOTER_THREADS = 16
_FIRST_ROWS_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class RowGroup:
    """Rows that are read together."""

    num_rows: int
    offset_bytes: int
    """Where it begins in the decompressed file; 0 for Parquet, which finds its row groups itself."""
    length_bytes: int


@dataclass(frozen=True)
class File:
    """One file, as it was when the manifest was made."""

    path: str
    """fsspec URL"""
    format: str
    """"parquet", "jsonl" or "json" (one array)"""
    compression: str | None
    """None, "gzip" or "zstd\""""
    size_bytes: int
    stamp: str
    """The filesystem's entity tag, or the time of the last change."""
    row_groups: tuple[RowGroup, ...]

    @property
    def num_rows(self) -> int:
        return sum(group.num_rows for group in self.row_groups)


@dataclass(frozen=True)
class ManifestSource:
    """One data set of the mixture."""

    name: str
    format: RowFormat
    """Its shape is never "auto"; its columns and roles are those that were named."""
    columns: Mapping[str, str]
    """Field -> the column that the first rows have it in, named or found: for people to read. Where none was named,
    another row may have it under another of the usual names."""
    files: tuple[File, ...]

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)


@dataclass(frozen=True)
class Manifest:
    """Every source's files. Plain data: it travels to the loader's processes as it is."""

    sources: tuple[ManifestSource, ...]

    @property
    def num_rows(self) -> int:
        return int(self.group_starts[-1])

    @property
    def source_names(self) -> tuple[str, ...]:
        return tuple(source.name for source in self.sources)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits over names, columns, row counts, sizes and stamps; not over the folders' names."""
        content = [
            [
                *(source.name, source.format.shape),
                *(sorted(named.items()) for named in (source.format.columns, source.format.roles)),
            ]
            + [
                [
                    file.path.rsplit("/", 1)[-1],
                    [group.num_rows for group in file.row_groups],
                    file.size_bytes,
                    file.stamp,
                ]
                for file in source.files
            ]
            for source in self.sources
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    @cached_property
    def group_starts(self) -> Int64:
        """int64 [groups + 1]: the id of each row group's first row, and the number of rows."""
        counts = [group.num_rows for _, file in self._files for group in file.row_groups]
        return offsets_of(counts)

    def group_location(self, group: int) -> tuple[int, File, int]:
        """Where row group number `group` of the whole lies: source, file, number within the file."""
        file_number = int(np.searchsorted(self._file_groups, group, side="right")) - 1
        source_id, file = self._files[file_number]
        return source_id, file, group - int(self._file_groups[file_number])

    def source_of(self, row_ids: Int64) -> Int32:
        """int32 [rows]: which source each row is of."""
        return (np.searchsorted(self._source_starts, row_ids, side="right") - 1).astype(np.int32)

    def locate(self, row_id: int) -> tuple[str, str, int]:
        """The source's name, the file and the row's number in it (from 0), as a person would look it up."""
        assert 0 <= row_id < self.num_rows, row_id
        file_starts = self.group_starts[self._file_groups]
        file_number = int(np.searchsorted(file_starts, row_id, side="right")) - 1
        source_id, file = self._files[file_number]
        return self.sources[source_id].name, file.path, row_id - int(file_starts[file_number])

    @cached_property
    def _files(self) -> tuple[tuple[int, File], ...]:
        return tuple((i, file) for i, source in enumerate(self.sources) for file in source.files)

    @cached_property
    def _file_groups(self) -> Int64:
        """int64 [files]: the number of each file's first row group. One without any shares it with the next file,
        which is the one found by a search from the right; the same holds for rows, below and in `read`."""
        counts = [len(file.row_groups) for _, file in self._files]
        return offsets_of(counts)[:-1]

    @cached_property
    def _source_starts(self) -> Int64:
        counts = [source.num_rows for source in self.sources]
        return offsets_of(counts)[:-1]

    def to_json(self) -> str:
        sources = [
            {
                "name": source.name,
                "format": {
                    "shape": source.format.shape,
                    "columns": dict(source.format.columns),
                    "roles": dict(source.format.roles),
                },
                "columns": dict(source.columns),
                "num_rows": source.num_rows,
                "files": [
                    {
                        "path": file.path,
                        "format": file.format,
                        "compression": file.compression,
                        "size_bytes": file.size_bytes,
                        "stamp": file.stamp,
                        "row_groups": [
                            [g.num_rows, g.offset_bytes, g.length_bytes] for g in file.row_groups
                        ],
                    }
                    for file in source.files
                ],
            }
            for source in self.sources
        ]
        content = {"version": MANIFEST_VERSION, "fingerprint": self.fingerprint, "sources": sources}
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = "manifest.json") -> Manifest:
        """Reads what `to_json` wrote; `where` names the file in errors.

        Raises:
            SourceError: not a manifest, or one of another version.
        """
        try:
            content = json.loads(text)
            if content["version"] != MANIFEST_VERSION:
                raise SourceError(
                    f"{where}: manifest of version {content['version']}; this miles reads version {MANIFEST_VERSION}"
                )
            return cls(tuple(_source_from_json(source) for source in content["sources"]))
        except (ValueError, KeyError, TypeError, ConfigError) as error:
            raise SourceError(
                f"{where}: not a manifest ({type(error).__name__}: {error})"
            ) from error


def _source_from_json(content: Mapping[str, Any]) -> ManifestSource:
    files = tuple(
        File(
            path=file["path"],
            format=file["format"],
            compression=file["compression"],
            size_bytes=file["size_bytes"],
            stamp=file["stamp"],
            row_groups=tuple(RowGroup(*group) for group in file["row_groups"]),
        )
        for file in content["files"]
    )
    named = content["format"]
    format = RowFormat(named["shape"], named["columns"], named["roles"])
    return ManifestSource(content["name"], format, content["columns"], files)


def build_manifest(sources: Sequence[SourceConfig]) -> Manifest:
    """Finds the files of every source, the rows in them, and what those look like.

    Raises:
        SourceError: a file that is missing, unreadable, corrupt or of an unknown kind; a source without a row, or
            whose rows are of no known shape.
        ConfigError: named columns that are not of one shape.
    """
    paths = [[url for path in source.paths for url in _expand(path)] for source in sources]
    # Footers and first rows wait on the network; the map keeps their order.
    with ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="miles-manifest") as pool:
        described = iter(list(pool.map(describe_file, [path for group in paths for path in group])))
        files = [tuple(next(described) for _ in source_paths) for source_paths in paths]
        return Manifest(tuple(pool.map(_describe_source, sources, files)))


def _describe_source(source: SourceConfig, files: tuple[File, ...]) -> ManifestSource:
    first = next((file for file in files if file.num_rows), None)
    if first is None:
        raise SourceError(
            f"source {source.name!r} has no row: {', '.join(file.path for file in files)}"
        )
    if first.format == "parquet":
        rows, columns = _first_parquet_rows(first, known_columns(source.format))
    else:
        rows = _first_json_rows(first)
        columns = list(dict.fromkeys(name for row in rows for name in row))
    format = detect_format(source, rows, columns)
    return ManifestSource(source.name, format, find_columns(format, rows), files)


def _first_parquet_rows(
    file: File, wanted: frozenset[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The wanted columns of the first rows, without those rows that are not text; and the names of all columns."""
    group = next(number for number, group in enumerate(file.row_groups) if group.num_rows)
    names = parquet.footer(file.path, file.size_bytes, file.stamp).schema.to_arrow_schema().names
    columns = [name for name in names if name in wanted]
    if not columns:
        return [], names
    with storage.reading(file.path):
        opened = parquet.open_file(
            file.path, file.size_bytes, file.stamp, buffer_bytes=_FIRST_ROWS_BUFFER_BYTES
        )
        batches = opened.iter_batches(
            FIRST_ROWS, row_groups=[group], columns=columns, use_threads=False
        )
        table = pa.Table.from_batches([next(batches)])
    rows = []
    for number in range(table.num_rows):
        try:
            rows += table.slice(number, 1).to_pylist()
        except (ValueError, OverflowError):  # text that is not UTF-8, a date that Python has not
            continue
    return rows, names


def _first_json_rows(file: File) -> list[dict[str, Any]]:
    """The first rows, without those that are not JSON objects."""
    group = next(group for group in file.row_groups if group.num_rows)
    end = group.offset_bytes + group.length_bytes
    with storage.reading(file.path):
        if file.compression is None:
            block = storage.RangeFile(file.path, file.size_bytes).read_range(
                group.offset_bytes, end
            )
        else:
            content = bytearray()
            for chunk in json_scan.read_chunks(file.path, file.compression):
                content += chunk
                if len(content) >= end:
                    break
            block = bytes(content[group.offset_bytes : end])
        payloads = json_scan.split_rows(file.format, block)
    rows = []
    for payload in payloads[:FIRST_ROWS]:
        try:
            row = json.loads(payload)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def describe_file(url: str) -> File:
    """One file's entry in the manifest.

    Raises:
        SourceError: missing, unreadable, corrupt or of an unknown kind.
    """
    kind, compression = format_of(url)
    size_bytes, stamp = file_stamp(url)
    if kind == "parquet":
        footer = parquet.footer(url, size_bytes, stamp)
        groups = tuple(
            RowGroup(footer.row_group(i).num_rows, 0, 0) for i in range(footer.num_row_groups)
        )
    else:
        kind, extents = json_index.extents(url, compression, size_bytes, stamp)
        groups = tuple(RowGroup(*extent) for extent in extents)
    return File(url, kind, compression, size_bytes, stamp, groups)


def file_stamp(url: str) -> tuple[int, str]:
    """A file's size, and what changes when it is written anew.

    Raises:
        SourceError: missing or unreadable.
    """
    with storage.reading(url):
        info = storage.info(url)
        size_bytes = storage.size_of(url, info)
    keys = ("ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified", "created")
    stamp = next((f"{key}:{info[key]}" for key in keys if info.get(key)), "")
    return size_bytes, stamp.replace('"', "")


def _expand(path: str) -> list[str]:
    """A path's files. In a folder that holds Parquet, JSON beside it is about the data (a manifest, a ledger)."""
    with storage.reading(path):
        urls = storage.expand(path, tuple(FORMATS))
        tables = [url for url in urls if url.endswith(".parquet")]
        return tables if tables and storage.is_folder(path) else urls
