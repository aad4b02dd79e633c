"""JSON files as byte ranges: where the rows are, found in one streaming pass and in bounded memory.

    {"a": 1}\n\n{"a": 2}\n…             "jsonl": one row a line; blank lines are no rows
    [{"a": 1},\n {"a": 2}, …]           "json": values, which `json_values` finds
    {\n "a": 1\n}\n{\n "a": 2\n} …     "json"
    {"version": 1, "data": [{"a": 1}]}  "json"

All become extents `(rows, offset_bytes, length_bytes)` of about 1,000 rows, which `split_rows` cuts
into rows again. The beginning of a file tells its layout (`json_layout`). Offsets count
decompressed bytes.

A line that is not JSON is a matter of its row, and is rejected later. A broken value of an array
has no end that could be found, so it is an error of the file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from miles.common import storage
from miles.data.files import contents, decompress
from miles.data.files.json_layout import DECODER, Head, Layout, read_head
from miles.data.files.json_values import NotOneObjectError, ValueScanner, skip_space
from miles.data.files.raw_values import raw_values
from miles.errors import SourceError

Extent = tuple[int, int, int]
"""rows, offset in bytes, length in bytes"""

BUFFER_BYTES = 4 << 20
GROUP_ROWS = 1_000
GROUP_BYTES = 4 << 20


def scan(url: str, compression: str | None) -> tuple[str, list[Extent]]:
    """Find the rows of a JSON file, and join them to row groups.

    Returns:
        "jsonl" or "json" (values), and the extents of its row groups in file order.

    Raises:
        SourceError: the file is missing, truncated, or no JSON; or a value of an array is broken:
            the error gives its byte offset and line.
    """
    with storage.reading(url):
        head, chunks = _beginning(url, compression)
        layout = head.found.layout
        scanner = ValueScanner(url, chunks, head.start, head.num_lines)
        if layout is Layout.WRAPPED:
            try:
                return "json", group_rows(scanner.rows(layout, head.found.key))
            except NotOneObjectError:
                # It was a row like the others, which follow it.
                layout = head.found.if_not_alone
                head, chunks = _beginning(url, compression)
                scanner = ValueScanner(url, chunks, head.start, head.num_lines)

        if layout is Layout.LINES:
            return "jsonl", group_rows(_lines(chunks, head.start))
        return "json", group_rows(scanner.rows(layout))


def _beginning(url: str, compression: str | None) -> tuple[Head, Iterator[bytes]]:
    """Return a file's head, and its content from byte `head.start` on.

    Raises:
        SourceError: it is no JSON.
    """
    chunks = read_chunks(url, compression)
    first = _first_chunks(chunks)
    contents.require_text(url, b"".join(first)[: contents.HEAD_BYTES], compression)

    chunks = itertools.chain(first, chunks)
    head = read_head(chunks)
    if head.found.fault:
        raise SourceError(f"{url}: {head.found.fault}")
    return head, itertools.chain([head.content], chunks)


def _first_chunks(chunks: Iterator[bytes]) -> list[bytes]:
    """Return as many chunks as tell what a file is."""
    first: list[bytes] = []
    num_bytes = 0
    while num_bytes < contents.HEAD_BYTES and (chunk := next(chunks, b"")):
        first.append(chunk)
        num_bytes += len(chunk)
    return first


def split_rows(kind: str, block: bytes) -> list[bytes]:
    """Return the rows in the bytes of an extent.

    Args:
        kind: of the file, "jsonl" or "json".
    """
    if kind == "jsonl":
        return [line for line in block.split(b"\n") if line and not line.isspace()]

    values = raw_values(block)
    if values is not None:
        return [bytes(value) for value in values]

    rows = []
    text = block.decode("latin-1")
    at = 0
    while at < len(text):
        _, end = DECODER.raw_decode(text, at)
        rows.append(block[at:end])
        at = skip_space(text, end)
        if text[at : at + 1] == ",":
            at = skip_space(text, at + 1)
    return rows


def read_chunks(url: str, compression: str | None) -> Iterator[bytes]:
    """Yield a file's content, decompressed, in pieces of about `BUFFER_BYTES`."""
    return decompress.chunks_of(url, compression, BUFFER_BYTES)


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
