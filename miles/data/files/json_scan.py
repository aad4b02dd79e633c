"""JSON files as byte ranges: where the rows are, found in one streaming pass and in bounded memory.

    [{"a": 1},\n {"a": 2}, …]          one JSON array
    {"a": 1}\n\n{"a": 2}\n…            JSON lines; blank lines are no rows

Both become extents `(rows, offset_bytes, length_bytes)` of about 1,000 rows, which `split_rows`
cuts into rows again. The first byte tells which of the two a file is; where that is a [, its first
line does. Offsets count decompressed bytes.

An array is decoded as Latin-1, where one byte is one character: positions are byte offsets, and a
UTF-8 character may be cut anywhere. A line that is not JSON is a matter of its row, and is rejected
later. A broken element of an array has no end that could be found, so it is an error of the file.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
from collections.abc import Iterator
from typing import IO

import zstandard

from miles.common import storage
from miles.errors import SourceError

Extent = tuple[int, int, int]
"""rows, offset in bytes, length in bytes"""

BUFFER_BYTES = 4 << 20
GROUP_ROWS = 1_000
GROUP_BYTES = 4 << 20
MAX_ELEMENT_BYTES = 256 << 20
"""An element of an array that is longer is taken for one that is not closed."""

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")
# Numbers stay text: their value does not matter here, and Python refuses integers of over 4,300
# digits.
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str)
_ZSTD_PIECE_BYTES = 1 << 10
"""Decompressed at once: 32 MiB at most, since four bytes can stand for 128 KiB of one character."""
_CUT_TOKEN = 16
"""An error this close to the buffer's end may only mean that a token was cut: -Infinity,
\\ud83d."""


def scan(url: str, compression: str | None) -> tuple[str, list[Extent]]:
    """Find the rows of a JSON file, and join them to row groups.

    Returns:
        "jsonl" or "json" (one array), and the extents of its row groups in file order.

    Raises:
        SourceError: the file is missing or truncated, or an array has a broken element; the error
            gives its byte offset.
    """
    with storage.reading(url):
        chunks = read_chunks(url, compression)

        head, start = _head(chunks)
        chunks = itertools.chain([head], chunks)
        if _is_array(head.lstrip()):
            return "json", group_rows(_ArrayScanner(url, chunks, start).elements())
        return "jsonl", group_rows(_lines(chunks, start))


def _head(chunks: Iterator[bytes]) -> tuple[bytes, int]:
    """Read a file up to its first character that is not space.

    Returns:
        the chunk that holds it, and the byte at which that chunk begins. Neither a byte-order mark
        nor the space before counts: a small compressed file may hold gigabytes of it.
    """
    head = b""
    start = 0
    is_first = True
    for chunk in chunks:
        head += chunk
        if is_first and len(head) < len(_BOM) and _BOM.startswith(head):
            continue
        if is_first and head.startswith(_BOM):
            start = len(_BOM)
            head = head[start:]
        is_first = False

        if head.strip():
            break
        start += len(head)
        head = b""
    return head, start


def split_rows(kind: str, block: bytes) -> list[bytes]:
    """Return the rows in the bytes of an extent.

    Args:
        kind: of the file, "jsonl" or "json".
    """
    if kind == "jsonl":
        return [line for line in block.split(b"\n") if line and not line.isspace()]

    rows = []
    text = block.decode("latin-1")
    at = 0
    while at < len(text):
        _, end = _DECODER.raw_decode(text, at)
        rows.append(block[at:end])
        comma = _skip_space(text, end)
        at = _skip_space(text, comma + 1)
    return rows


def read_chunks(url: str, compression: str | None) -> Iterator[bytes]:
    """Yield a file's content, decompressed, in pieces of about `BUFFER_BYTES`."""
    raw = storage.RangeFile(url)
    if compression == "zstd":
        yield from _zstd_chunks(io.BufferedReader(raw, BUFFER_BYTES))
        return

    stream: storage.RangeFile | gzip.GzipFile = raw
    if compression == "gzip":
        stream = gzip.GzipFile(fileobj=io.BufferedReader(raw, BUFFER_BYTES))
    while chunk := stream.read(BUFFER_BYTES):
        yield chunk


def _zstd_chunks(raw: IO[bytes]) -> Iterator[bytes]:
    """Yield the content of all frames of a zstd file.

    zstandard's own stream reader ends at the first frame's end, and where a truncated file ends it
    reports no error.
    """
    frame = zstandard.ZstdDecompressor().decompressobj()
    has_begun = False
    ready = bytearray()

    while piece := raw.read(_ZSTD_PIECE_BYTES):
        has_begun = True
        while piece:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            ready += frame.decompress(piece)
            piece = frame.unused_data
        if len(ready) >= BUFFER_BYTES:
            yield bytes(ready)
            ready.clear()

    if has_begun and not frame.eof:
        raise EOFError("the file ends within a zstd frame")
    if ready:
        yield bytes(ready)


def group_rows(rows: Iterator[tuple[int, int]]) -> list[Extent]:
    """Join neighbouring rows, (begin, end) in bytes, to extents."""
    extents: list[Extent] = []
    num_rows = first = last = 0
    for begin, end in rows:
        if num_rows == 0:
            first = begin
        num_rows += 1
        last = end
        if num_rows == GROUP_ROWS or last - first >= GROUP_BYTES:
            extents.append((num_rows, first, last - first))
            num_rows = 0

    if num_rows:
        extents.append((num_rows, first, last - first))
    return extents


def _lines(chunks: Iterator[bytes], start: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) in bytes of every line that is not blank, without its newline.

    Args:
        chunks: the file's content from byte `start` on.
    """
    base = start  # the offset of the chunk
    line_begin = start
    is_blank = True
    for chunk in chunks:
        at = 0
        while at < len(chunk):
            newline = chunk.find(b"\n", at)
            end = newline if newline >= 0 else len(chunk)
            piece = chunk[at:end]
            is_blank = is_blank and (not piece or piece.isspace())
            if newline >= 0:
                if not is_blank:
                    yield line_begin, base + newline
                line_begin = base + newline + 1
                is_blank = True
            at = end + 1
        base += len(chunk)

    if not is_blank:
        yield line_begin, base


def _is_array(head: bytes) -> bool:
    """Return whether a file that begins so is one array, not JSON lines whose first is a list."""
    if head[:1] != b"[":
        return False
    line, _, rest = head.partition(b"\n")
    if rest.lstrip()[:1] not in (b"{", b"["):
        return True
    try:
        _DECODER.decode(line.decode("latin-1"))
    except (ValueError, RecursionError):
        return True
    return False


class _ArrayScanner:
    """Decodes one JSON array over a buffer that slides along the file.

    Args:
        chunks: the file's content from byte `start` on, which is where the array or the space
            before it begins.
    """

    def __init__(self, url: str, chunks: Iterator[bytes], start: int) -> None:
        self._url = url
        self._chunks = chunks
        self._text = ""
        self._base = start  # text[0] is this byte of the file
        self._at = 0  # the cursor, in the text
        self._num_elements = 0

    def elements(self) -> Iterator[tuple[int, int]]:
        """Yield (begin, end) in bytes of every element.

        Raises:
            SourceError: the array is broken, or text follows its end.
        """
        if self._next_character() != "[":
            raise self._broken(self._at, "expected [")
        self._at += 1

        if self._next_character() != "]":
            yield self._element()
            while self._next_character() != "]":
                self._take_comma()
                yield self._element()
        self._at += 1

        if not self._is_at_end():
            raise self._broken(self._at, "text after the array's end")

    def _element(self) -> tuple[int, int]:
        """Decode the element at the cursor and move behind it."""
        self._next_character()
        end = self._element_end()
        span = self._base + self._at, self._base + end
        self._at = end
        self._num_elements += 1
        return span

    def _element_end(self) -> int:
        """Return where the element at the cursor ends, reading on while it may be cut."""
        while True:
            try:
                _, end = _DECODER.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise self._broken(self._at, "nested too deeply") from error
            except json.JSONDecodeError as error:
                if self._may_be_cut(error) and self._read_on():
                    continue
                raise self._broken(error.pos, error.msg) from error

            # The beginning of a number may be a number too: 1.5 of 1.5e-7.
            is_number = self._text[self._at] in "-0123456789"
            if is_number and self._is_near_end(end) and self._read_on():
                continue
            return end

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        is_open = error.msg.startswith("Unterminated") or self._is_near_end(error.pos)
        return is_open and len(self._text) - self._at < MAX_ELEMENT_BYTES

    def _is_near_end(self, at: int) -> bool:
        return at >= len(self._text) - _CUT_TOKEN

    def _take_comma(self) -> None:
        if self._next_character() != ",":
            raise self._broken(self._at, "expected a comma or ]")
        self._at += 1

    def _next_character(self) -> str:
        """Move to the next character that is not space, and return it."""
        if self._is_at_end():
            raise self._broken(self._at, "the file ends before the array does")
        return self._text[self._at]

    def _is_at_end(self) -> bool:
        """Move behind space; return whether the file ends there."""
        while True:
            self._at = _skip_space(self._text, self._at)
            if self._at < len(self._text):
                return False
            if not self._read_on():
                return True

    def _read_on(self) -> bool:
        """Drop what lies before the cursor, and read more; return False at the end of the file.

        The rest at least doubles, so that a long element costs linear time.
        """
        rest = self._text[self._at :]
        parts = [rest]
        num_read = 0
        for chunk in self._chunks:
            parts.append(chunk.decode("latin-1"))
            num_read += len(chunk)
            if num_read >= max(len(rest), 1):
                break
        if num_read == 0:
            return False

        self._text = "".join(parts)
        self._base += self._at
        self._at = 0
        return True

    def _broken(self, at: int, what: str) -> SourceError:
        """Return the error for what is wrong at a position of the text."""
        return SourceError(
            f"{self._url}: broken JSON at byte {self._base + at}: {what}, in element "
            f"{self._num_elements} (counting from 0) of the array, which begins at byte "
            f"{self._base + self._at}. Nothing after it can be read: mend the file, or make it "
            "JSON lines, where a broken row is dropped by itself"
        )


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()
