"""What there is to read: every file's row groups and row counts, in one fixed order.

    sources ──expand──► files ──footers / one scan──► row groups      id of a row = its position in
     a: x.parquet         x (1000, 1000, 418 rows)                    sources x files x rows order
     b: y.jsonl, z.json   y (3 rows)  z (2 rows)                      y's first row is row 2418

Of Parquet only the footers are read; a JSON file is scanned once, for byte offsets. The fingerprint is
the same wherever the files lie, and another one as soon as a file is added, renamed or written anew.
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
import pyarrow.parquet as pq

from miles import storage
from miles.data import scan
from miles.data.config import SourceConfig
from miles.data.sources import FORMATS, format_of
from miles.data.types import Int32, Int64
from miles.errors import SourceError

MANIFEST_VERSION = 1
_FOOTER_THREADS = 16


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
    messages_key: str | None
    tools_key: str | None
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
            [source.name, source.messages_key, source.tools_key]
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
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

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
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)[:-1]

    @cached_property
    def _source_starts(self) -> Int64:
        counts = [source.num_rows for source in self.sources]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)[:-1]

    def to_json(self) -> str:
        sources = [
            {
                "name": source.name,
                "messages_key": source.messages_key,
                "tools_key": source.tools_key,
                "num_rows": source.num_rows,
                "files": [
                    {
                        "path": file.path,
                        "format": file.format,
                        "compression": file.compression,
                        "size_bytes": file.size_bytes,
                        "stamp": file.stamp,
                        "row_groups": [[g.num_rows, g.offset_bytes, g.length_bytes] for g in file.row_groups],
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
        except (ValueError, KeyError, TypeError) as error:
            raise SourceError(f"{where}: not a manifest ({type(error).__name__}: {error})") from error


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
    return ManifestSource(content["name"], content["messages_key"], content["tools_key"], files)


def build_manifest(sources: Sequence[SourceConfig]) -> Manifest:
    """Finds the files of every source, and the rows in them.

    Raises:
        SourceError: a file that is missing, unreadable, corrupt or of an unknown kind; a source without a row.
    """
    paths = [[url for path in source.paths for url in _expand(path)] for source in sources]
    # Footers wait on the network; the map keeps the files' order.
    with ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="miles-manifest") as pool:
        files = iter(list(pool.map(describe_file, [path for group in paths for path in group])))
    manifest = Manifest(
        tuple(
            ManifestSource(source.name, source.messages_key, source.tools_key, tuple(next(files) for _ in source_paths))
            for source, source_paths in zip(sources, paths, strict=True)
        )
    )
    for source in manifest.sources:
        if source.num_rows == 0:
            raise SourceError(f"source {source.name!r} has no row: {', '.join(file.path for file in source.files)}")
    return manifest


def describe_file(url: str) -> File:
    """One file's entry in the manifest.

    Raises:
        SourceError: missing, unreadable, corrupt or of an unknown kind.
    """
    kind, compression = format_of(url)
    size_bytes, stamp = file_stamp(url)
    if kind == "parquet":
        with open_parquet(url) as file:
            metadata = file.metadata
            groups = tuple(RowGroup(metadata.row_group(i).num_rows, 0, 0) for i in range(metadata.num_row_groups))
    else:
        kind, extents = scan.scan(url, compression)
        groups = tuple(RowGroup(*extent) for extent in extents)
    return File(url, kind, compression, size_bytes, stamp, groups)


def file_stamp(url: str) -> tuple[int, str]:
    """A file's size, and what changes when it is written anew.

    Raises:
        SourceError: missing or unreadable.
    """
    with scan.reading(url):
        fs, path = storage.filesystem(url)
        info = fs.info(path)
    keys = ("ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified", "created")
    stamp = next((f"{key}:{info[key]}" for key in keys if info.get(key)), "")
    return int(info.get("size") or 0), stamp.replace('"', "")


def open_parquet(url: str) -> pq.ParquetFile:
    """A Parquet file with its footer read; the caller closes it.

    Raises:
        SourceError: missing, unreadable, no Parquet, or with a column of an Arrow extension type.
    """
    with scan.reading(url):
        fs, path = storage.filesystem(url)
        if storage.is_local(url):
            file = pq.ParquetFile(path)
        else:
            # Without fsspec's own read-ahead: a footer or a column is one request of the size that it has.
            file = pq.ParquetFile(fs.open(path, "rb", cache_type="none"), pre_buffer=True)
        for field in file.schema_arrow:
            if _is_extension(field):
                raise SourceError(
                    f"{url}: column {field.name!r} is of an Arrow extension type ({field.type}), which is not read: "
                    "such types can run code when they are loaded. Write the column as plain Arrow data"
                )
    return file


def _is_extension(field: pa.Field) -> bool:
    if isinstance(field.type, pa.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {}):
        return True
    return any(_is_extension(field.type.field(i)) for i in range(field.type.num_fields))


def _expand(path: str) -> list[str]:
    """A path's files. In a folder that holds Parquet, JSON beside it is about the data (a manifest, a ledger)."""
    with scan.reading(path):
        urls = storage.expand(path, tuple(FORMATS))
        fs, name = storage.filesystem(path)
        parquet = [url for url in urls if url.endswith(".parquet")]
        return parquet if parquet and fs.isdir(name) else urls
