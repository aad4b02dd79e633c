"""JSON files as byte ranges: where the rows are, found in one streaming pass and in bounded memory.

    [{"a": 1},\n {"a": 2}, …]          one JSON array
    {"a": 1}\n\n{"a": 2}\n…            JSON lines; blank lines are no rows

both become extents `(rows, offset_bytes, length_bytes)` of about 1,000 rows, which `split_rows` cuts into
rows again. Which of the two a file is, its first byte says; where that is a [, its first line. Offsets count
decompressed bytes. An array is decoded as Latin-1, where one byte is one character: positions are byte
offsets, and a UTF-8 character may be cut anywhere. Whether a line is JSON at all is judged later, row by
row; a broken element of an array has no end that could be found, so it is an error of the whole file.
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
"""An array's element that is longer is taken for one that is not closed."""

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")
# Numbers stay text: their value does not matter here, and Python refuses integers of over 4,300 digits.
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str)
_CUT_TOKEN = 16
"""An error this close to the end of the buffer may only mean that a token was cut: -Infinity, \\ud83d."""


def scan(url: str, compression: str | None) -> tuple[str, list[Extent]]:
    """Finds the rows of a JSON file.

    Returns:
        "jsonl" or "json" (one array), and the extents of its row groups in file order.

    Raises:
        SourceError: the file is missing, truncated, or an array with a broken element (with its byte offset).
    """
    with storage.reading(url):
        chunks = read_chunks(url, compression)
        head = b""
        for chunk in chunks:
            head += chunk
            if head.removeprefix(_BOM).lstrip():
                break
        start = len(_BOM) if head.startswith(_BOM) else 0
        chunks = itertools.chain([head], chunks)
        if _is_array(head[start:].lstrip()):
            return "json", _group(_array_elements(url, chunks, start))
        return "jsonl", _group(_lines(chunks, start))


def _is_array(head: bytes) -> bool:
    """Whether a file that begins so is one array, and not JSON lines of which the first happens to be a list."""
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


def split_rows(kind: str, block: bytes) -> list[bytes]:
    """Cuts what lies at an extent of a "jsonl" or "json" file into its rows."""
    if kind == "jsonl":
        return [line for line in block.split(b"\n") if line and not line.isspace()]
    rows, at, text = [], 0, block.decode("latin-1")
    while at < len(text):
        _, end = _DECODER.raw_decode(text, at)
        rows.append(block[at:end])
        at = _skip_space(text, end)
        at = _skip_space(text, at + 1)  # the comma
    return rows


def read_chunks(url: str, compression: str | None) -> Iterator[bytes]:
    """A file's content, decompressed, in pieces of about `BUFFER_BYTES`."""
    raw = storage.RangeFile(url)
    if compression == "zstd":
        yield from _zstd_chunks(io.BufferedReader(raw, BUFFER_BYTES))
        return
    stream = (
        gzip.GzipFile(fileobj=io.BufferedReader(raw, BUFFER_BYTES))
        if compression == "gzip"
        else raw
    )
    while chunk := stream.read(BUFFER_BYTES):
        yield chunk


def _zstd_chunks(raw: IO[bytes]) -> Iterator[bytes]:
    """Frames one after another. zstandard's own stream reader ends at the first frame's end, or, without a
    word, where a truncated file ends."""
    frame = zstandard.ZstdDecompressor().decompressobj()
    ready, begun = bytearray(), False
    while piece := raw.read(64 << 10):
        while piece:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            ready += frame.decompress(piece)
            begun, piece = True, frame.unused_data
        if len(ready) >= BUFFER_BYTES:
            yield bytes(ready)
            ready.clear()
    if begun and not frame.eof:
        raise EOFError("the file ends within a zstd frame")
    if ready:
        yield bytes(ready)


def _group(rows: Iterator[tuple[int, int]]) -> list[Extent]:
    """Joins neighbouring rows (begin, end) to extents."""
    extents: list[Extent] = []
    num_rows = first = last = 0
    for begin, end in rows:
        if num_rows == 0:
            first = begin
        num_rows, last = num_rows + 1, end
        if num_rows == GROUP_ROWS or last - first >= GROUP_BYTES:
            extents.append((num_rows, first, last - first))
            num_rows = 0
    if num_rows:
        extents.append((num_rows, first, last - first))
    return extents


def _lines(chunks: Iterator[bytes], start: int) -> Iterator[tuple[int, int]]:
    """(begin, end) in bytes of every line that is not blank, without its newline."""
    base, line_begin, is_blank = 0, start, True
    for chunk in chunks:
        at = max(start - base, 0)
        while at < len(chunk):
            newline = chunk.find(b"\n", at)
            end = newline if newline >= 0 else len(chunk)
            piece = chunk[at:end]
            is_blank = is_blank and (not piece or piece.isspace())
            if newline >= 0:
                if not is_blank:
                    yield line_begin, base + newline
                line_begin, is_blank = base + newline + 1, True
            at = end + 1
        base += len(chunk)
    if not is_blank:
        yield line_begin, base


def _array_elements(url: str, chunks: Iterator[bytes], start: int) -> Iterator[tuple[int, int]]:
    """(begin, end) in bytes of every element, by decoding over a sliding buffer."""
    text, base, at = "", 0, start  # text[at] is byte base + at of the file
    num_elements = 0

    def more() -> bool:
        """Drops what was read and at least doubles the rest, so that a long element costs linear time."""
        nonlocal text, base, at
        parts, size, wanted = [text[at:]], 0, max(len(text) - at, 1)
        for chunk in chunks:
            parts.append(chunk.decode("latin-1"))
            size += len(chunk)
            if size >= wanted:
                break
        if size == 0:
            return False
        # `at` lies beyond the buffer only at the very start, in front of a byte-order mark.
        passed = min(at, len(text))
        text, base, at = "".join(parts), base + passed, at - passed
        return True

    def broken(offset: int, what: str) -> SourceError:
        return SourceError(
            f"{url}: broken JSON at byte {offset}: {what}, in element {num_elements} (counting from 0) of the array, "
            f"which begins at byte {base + at}. Nothing after it can be read: mend the file, or make it JSON lines, "
            "where a broken row is dropped by itself"
        )

    expected = "["
    while True:
        at = _skip_space(text, at) if at < len(text) else at
        if at >= len(text):
            if more():
                continue
            if expected == "end":
                return
            raise broken(base + at, "the file ends before the array does")
        character = text[at]
        if expected == "[":  # that it is one, the caller saw
            at, expected = at + 1, "element or ]"
        elif expected == "end":
            raise broken(base + at, "text after the array's end")
        elif character == "]" and expected in ("element or ]", ", or ]"):
            at, expected = at + 1, "end"
        elif expected == ", or ]":
            if character != ",":
                raise broken(base + at, "expected a comma or ]")
            at, expected = at + 1, "element"
        else:
            try:
                _, end = _DECODER.raw_decode(text, at)
            except RecursionError as error:
                raise broken(base + at, "nested too deeply") from error
            except json.JSONDecodeError as error:
                was_cut = (
                    error.msg.startswith("Unterminated") or error.pos >= len(text) - _CUT_TOKEN
                )
                if was_cut and len(text) - at < MAX_ELEMENT_BYTES and more():
                    continue
                raise broken(base + error.pos, error.msg) from error
            # Of a cut number, 1.5e-7, what is there may be a number too: 1.5
            if character in "-0123456789" and end >= len(text) - _CUT_TOKEN and more():
                continue
            yield base + at, base + end
            num_elements += 1
            at, expected = end, ", or ]"


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()
