"""The bytes of a JSON file's row groups, read by ranges, or in one pass where it is compressed.

    group of 1,000 rows, 4 MB          ->  its bytes
    group that ends with a 1 GB line   ->  its bytes, with a stand-in of 20 bytes for that line

A group ends where it has 4 MB. So only its last row can be large, and memory is bounded by what one
row may have (`MAX_ROW_BYTES`), whatever a file holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from miles.common import storage
from miles.data.files import csv_scan, json_scan
from miles.data.files.csv_rows import block_to_json
from miles.data.files.file import CSV, File, RowGroup
from miles.data.types import MAX_ROW_BYTES, OVERSIZED_ROW
from miles.errors import SourceError


def json_blocks(file: File, groups: Sequence[RowGroup]) -> Iterator[bytes]:
    """Yield the bytes of row groups, for `json_scan.split_rows`.

    Args:
        groups: ascending.
    """
    content = None if file.compression is None else _Decompressed(file)
    for group in groups:
        pieces = _ranges(file, group) if content is None else content.pieces(group)
        is_small = group.length_bytes <= MAX_ROW_BYTES
        # An element of an array was in memory already when it was found.
        if is_small or file.format != "jsonl":
            yield b"".join(pieces)
        else:
            yield without_oversized(pieces)


def rows_of_block(file: File, block: bytes) -> list[bytes]:
    """Return the rows in the bytes of a row group, each as JSON text."""
    if file.format in CSV:
        header = csv_scan.kept_header(file.path, file.format, file.compression, file.stamp)
        return block_to_json(block, header)
    return json_scan.split_rows(file.format, block)


def without_oversized(pieces: Iterable[bytes]) -> bytes:
    """Return lines, with a stand-in for each one that is larger than a row may be.

    Args:
        pieces: the lines' bytes.
    """
    lines: list[bytes] = []
    line = _Line()
    for piece in pieces:
        first, *others = piece.split(b"\n")
        line.add(first)
        for part in others:
            lines.append(line.content())
            line = _Line()
            line.add(part)
    lines.append(line.content())
    return b"\n".join(lines)


class _Line:
    """A line that comes in pieces, of which no more is kept than a row may have."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self._num_bytes = 0
        self._is_blank = True

    def add(self, piece: bytes) -> None:
        self._num_bytes += len(piece)
        self._is_blank = self._is_blank and (not piece or piece.isspace())
        if self._num_bytes <= MAX_ROW_BYTES:
            self._kept += piece

    def content(self) -> bytes:
        """Return the line, or what stands for it; a blank line stays blank, since it is no row."""
        if self._num_bytes <= MAX_ROW_BYTES:
            return bytes(self._kept)
        return b"" if self._is_blank else OVERSIZED_ROW + str(self._num_bytes).encode()


def _ranges(file: File, group: RowGroup) -> Iterator[bytes]:
    """Yield the bytes of a row group of a file that is not compressed.

    They are one piece, unless the group is so large that it holds an oversized row.
    """
    ranges = storage.RangeFile(file.path, file.size_bytes)
    end = group.offset_bytes + group.length_bytes
    is_small = group.length_bytes <= MAX_ROW_BYTES
    step = max(group.length_bytes, 1) if is_small else json_scan.BUFFER_BYTES
    for begin in range(group.offset_bytes, end, step):
        yield ranges.read_range(begin, min(begin + step, end))


class _Decompressed:
    """The content of a compressed file, which is read once from its start."""

    def __init__(self, file: File) -> None:
        self._path = file.path
        self._chunks = json_scan.read_chunks(file.path, file.compression)
        self._chunk = b""
        self._base = 0  # the chunk's first byte in the decompressed file

    def pieces(self, group: RowGroup) -> Iterator[bytes]:
        """Yield the bytes of a row group, which lies behind those that were read before.

        Raises:
            SourceError: the file ends before.
        """
        at = group.offset_bytes
        end = at + group.length_bytes
        while at < end:
            while self._base + len(self._chunk) <= at:
                self._base += len(self._chunk)
                chunk = next(self._chunks, None)
                if chunk is None:
                    raise SourceError(f"{self._path}: ends before the rows that were counted do")
                self._chunk = chunk

            piece = self._chunk[at - self._base : end - self._base]
            yield piece
            at += len(piece)
