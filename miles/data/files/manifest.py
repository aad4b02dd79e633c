"""The manifest of a run: every file's row groups and row counts, in one fixed order.

    sources ──files──► files ──footers / one scan──► row groups      id of a row = its position in
     a: x.parquet       x (1000, 1000, 418 rows)                     sources x files x rows order
     b: y.jsonl, z.json y (3 rows)  z (2 rows)                       y's first row is row 2418

Only the footers of Parquet files are read. A JSON file is scanned once, and the byte offsets of its
row groups are kept (`json_index`). The first rows of each source's first file are read to detect
their shape (`row_shapes`), and those of a few other files to see that they have it (`other_files`).

The fingerprint is the same wherever the files lie. It changes when a file is added, renamed or
written anew, or when rows are read in another way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any

import numpy as np

from miles.common.offsets import offsets_of
from miles.data.config import RowFormat, SourceConfig
from miles.data.files.file import (
    CSV,
    File,
    RowGroup,
    describe_file,
    describe_unread,
    with_text_columns,
)
from miles.data.files.first_rows import first_rows
from miles.data.files.left_out import LeftOut, merged
from miles.data.files.locate import Located, locate
from miles.data.files.named_columns import require_named_columns
from miles.data.files.other_files import other_shape, require_one_shape
from miles.data.files.row_columns import TOOLS_WITHIN, columns_of_shape, known_columns
from miles.data.files.row_shapes import detect_format, find_columns
from miles.data.files.unused_columns import unused_columns
from miles.data.transforms import Transform
from miles.data.types import Int32, Int64
from miles.errors import ConfigError, SourceError

MANIFEST_VERSION = 2
_THREADS = 16


@dataclass(frozen=True)
class ManifestSource:
    """One data set of the mixture."""

    name: str
    format: RowFormat
    """Its shape is never "auto"; its columns and roles are the ones that the user named."""
    columns: Mapping[str, str]
    """Field -> the column that holds it in the first rows, named or found: for people to read.
    Where none was named, another row may have it under another of the usual names."""
    files: tuple[File, ...]
    left_out: tuple[LeftOut, ...] = ()
    """What was found beside the files and is not read, for people to see. Empty also in a manifest
    of an older version, which did not look."""
    unused_columns: tuple[str, ...] = ()
    """Columns of the first rows of which nothing is made. Not part of the fingerprint; empty also
    in manifests from before they were noted."""

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)


@dataclass(frozen=True)
class Manifest:
    """The files of every source. Plain data: it travels to the loaders as it is."""

    sources: tuple[ManifestSource, ...]

    @property
    def num_rows(self) -> int:
        return int(self.group_starts[-1])

    @property
    def source_names(self) -> tuple[str, ...]:
        return tuple(source.name for source in self.sources)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits over names, columns, row counts, sizes, stamps and the code of a transform;
        not over folders."""
        content = [_fingerprinted(source) for source in self.sources]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    @cached_property
    def group_starts(self) -> Int64:
        """int64 [groups + 1]: the id of each row group's first row, and the number of rows."""
        counts: list[int] = []
        for _, file in self._files:
            counts += [group.num_rows for group in file.row_groups]
        return offsets_of(counts)

    def group_location(self, group: int) -> tuple[int, File, int]:
        """Return the source id and the file of a row group, and its number within the file.

        Args:
            group: its number in the manifest.
        """
        file_number = int(np.searchsorted(self._file_groups, group, side="right")) - 1
        source_id, file = self._files[file_number]
        return source_id, file, group - int(self._file_groups[file_number])

    def source_of(self, row_ids: Int64) -> Int32:
        """Return the source id of each row: int32 [rows]."""
        return (np.searchsorted(self._source_starts, row_ids, side="right") - 1).astype(np.int32)

    def locate(self, row_id: int) -> tuple[str, str, int]:
        """Return a row's source name, file and number in the file (from 0), as people know it."""
        assert 0 <= row_id < self.num_rows, row_id
        file_starts = self.group_starts[self._file_groups]
        file_number = int(np.searchsorted(file_starts, row_id, side="right")) - 1
        source_id, file = self._files[file_number]
        return self.sources[source_id].name, file.path, row_id - int(file_starts[file_number])

    @cached_property
    def _files(self) -> tuple[tuple[int, File], ...]:
        """Every file with its source id."""
        files: list[tuple[int, File]] = []
        for source_id, source in enumerate(self.sources):
            files += [(source_id, file) for file in source.files]
        return tuple(files)

    @cached_property
    def _file_groups(self) -> Int64:
        """int64 [files]: the number of each file's first row group.

        A file without row groups shares it with the next file, which is the one that a search from
        the right finds. The same holds for a file or source without rows.
        """
        return offsets_of([len(file.row_groups) for _, file in self._files])[:-1]

    @cached_property
    def _source_starts(self) -> Int64:
        """int64 [sources]: the id of each source's first row."""
        return offsets_of([source.num_rows for source in self.sources])[:-1]

    def to_json(self) -> str:
        """Return the manifest as JSON, for the run's folder and for `from_json`."""
        content = {
            "version": MANIFEST_VERSION,
            "fingerprint": self.fingerprint,
            "sources": [_source_to_json(source) for source in self.sources],
        }
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = "manifest.json") -> Manifest:
        """Read what `to_json` wrote.

        Args:
            where: the file, for errors.

        Raises:
            SourceError: not a manifest, or one of another version.
        """
        try:
            content = json.loads(text)
            version = content["version"]

            if version != MANIFEST_VERSION:
                raise SourceError(
                    f"{where}: manifest of version {version}; this miles reads version "
                    f"{MANIFEST_VERSION}"
                )
            return cls(tuple(_source_from_json(source) for source in content["sources"]))
        except (ValueError, KeyError, TypeError, ConfigError) as error:
            raise SourceError(
                f"{where}: not a manifest ({type(error).__name__}: {error})"
            ) from error


def build_manifest(sources: Sequence[SourceConfig]) -> Manifest:
    """Find the files of every source, count the rows in them, and detect their shapes.

    Raises:
        SourceError: a file is missing, unreadable, corrupt or of an unknown format; or a source has
            no row, or rows of no known shape.
        ConfigError: the named columns of a source are not of one shape.
    """
    located = [_locate_source(source) for source in sources]

    # Footers and first rows wait on the network. A pool's map keeps their order.
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="miles-manifest") as pool:
        urls = chain.from_iterable(source.urls for source in located)
        described = iter(list(pool.map(describe_file, urls)))
        files = [tuple(islice(described, len(source.urls))) for source in located]
        left_out = [source.left_out for source in located]
        described_sources = tuple(pool.map(_describe_source, sources, files, left_out))
    require_named_columns(sources, files, [source.columns for source in described_sources])
    return Manifest(described_sources)


def _locate_source(source: SourceConfig) -> Located:
    """Return the files of all paths of a source, in their order."""
    parts = [
        locate(path, source.split, is_evaluation=source.is_evaluation) for path in source.paths
    ]
    urls = chain.from_iterable(part.urls for part in parts)
    left_out = chain.from_iterable(part.left_out for part in parts)
    return Located(tuple(urls), merged(list(left_out)))


def _describe_source(
    source: SourceConfig, files: tuple[File, ...], left_out: tuple[LeftOut, ...]
) -> ManifestSource:
    first = next((file for file in files if file.num_rows), None)
    if first is None:
        without_rows = ", ".join(map(_without_rows, files))
        raise SourceError(
            f"source {source.name!r} has no row: {without_rows}. Write rows into it, or name "
            "another file"
        )
    is_unknown = source.format.shape == "auto"
    wanted = known_columns(source.format) | {TOOLS_WITHIN}
    transform = source.format.transform
    rows, columns = first_rows(first, wanted, any_needed=is_unknown, transform=transform)
    try:
        format = detect_format(source, rows, columns, first.path)
    except SourceError as error:
        elsewhere = other_shape(source, first, files)
        if elsewhere:
            raise SourceError(f"{error}. {elsewhere}") from None
        if transform is not None:
            raise SourceError(f"{error}. These are the rows that {transform.name} makes") from None
        format = _format_in_bytes(source, first)

    if transform is None:
        needed = columns_of_shape(format)
        named = frozenset(source.format.columns.values())
        files = tuple(with_text_columns(file, needed, named) for file in files)
        if first.unread_columns:  # some of them may be read now
            first = with_text_columns(first, needed, named)
            rows, _ = first_rows(first, known_columns(format) | {TOOLS_WITHIN})
    require_one_shape(source, format, first, files)
    return ManifestSource(
        source.name,
        format,
        find_columns(format, rows),
        files,
        left_out,
        unused_columns(format, rows, columns),
    )


def _without_rows(file: File) -> str:
    """Return a file's path, and what it holds instead of rows."""
    if file.size_bytes == 0:
        return f"{file.path} (an empty file)"
    is_blank = file.format == "jsonl" and file.compression is None
    return f"{file.path} ({'only blanks' if is_blank else 'no row'})"


def _format_in_bytes(source: SourceConfig, first: File) -> RowFormat:
    """Detect the shape of rows that may be in columns of bytes, read as text.

    Args:
        first: a file that has rows, which its other columns do not hold.

    Raises:
        SourceError: these do not hold rows either. It says what all columns look like, and which
            are not read.
    """
    known = known_columns(source.format)
    with_text = with_text_columns(first, known, frozenset(source.format.columns.values()))
    _, columns = first_rows(with_text, known)
    rows, _ = first_rows(with_text, known.union(columns))
    try:
        return detect_format(source, rows, columns, first.path)
    except SourceError as error:
        notes = [str(error)]
        if first.unread_columns:
            notes.append(describe_unread(first))
        if first.format in CSV:
            notes.append("The first line of a CSV file names its columns")
        raise SourceError(". ".join(notes)) from None


def _fingerprinted(source: ManifestSource) -> list[Any]:
    """Return what the fingerprint covers of a source. Its form is fixed: it is hashed as JSON."""
    files = []
    for file in source.files:
        name = file.path.rsplit("/", 1)[-1]
        counts = [group.num_rows for group in file.row_groups]
        files.append([name, counts, file.size_bytes, file.stamp])

    columns = sorted(source.format.columns.items())
    roles = sorted(source.format.roles.items())
    transform = source.format.transform
    code = [] if transform is None else [{"transform": transform.code}]
    return [source.name, source.format.shape, columns, roles, *files, *code]


def _source_to_json(source: ManifestSource) -> dict[str, Any]:
    transform = source.format.transform
    made_by = {} if transform is None else {"transform": transform.to_json()}
    return {
        "name": source.name,
        "format": {
            "shape": source.format.shape,
            "columns": dict(source.format.columns),
            "roles": dict(source.format.roles),
            **made_by,
        },
        "columns": dict(source.columns),
        "unused_columns": list(source.unused_columns),
        "num_rows": source.num_rows,
        "files": [_file_to_json(file) for file in source.files],
        "left_out": [group.to_json() for group in source.left_out],
    }


def _source_from_json(content: Mapping[str, Any]) -> ManifestSource:
    named = content["format"]
    made_by = named.get("transform")
    # Nothing is imported here: that is done where rows are read, and other code is refused.
    transform = None if made_by is None else Transform.from_json(made_by)
    return ManifestSource(
        content["name"],
        RowFormat(named["shape"], named["columns"], named["roles"], transform),
        content["columns"],
        tuple(_file_from_json(file) for file in content["files"]),
        tuple(LeftOut.from_json(group) for group in content.get("left_out", ())),
        tuple(content.get("unused_columns", ())),
    )


def _file_to_json(file: File) -> dict[str, Any]:
    unread = {"unread_columns": list(file.unread_columns)} if file.unread_columns else {}
    return {
        "path": file.path,
        "format": file.format,
        "compression": file.compression,
        "size_bytes": file.size_bytes,
        "stamp": file.stamp,
        "row_groups": [[g.num_rows, g.offset_bytes, g.length_bytes] for g in file.row_groups],
        **unread,
    }


def _file_from_json(content: Mapping[str, Any]) -> File:
    return File(
        path=content["path"],
        format=content["format"],
        compression=content["compression"],
        size_bytes=content["size_bytes"],
        stamp=content["stamp"],
        row_groups=tuple(RowGroup(*group) for group in content["row_groups"]),
        unread_columns=tuple(content.get("unread_columns", ())),
    )
