"""CSV and TSV files as byte ranges: where the rows are, found in one pass that minds quotes.

    prompt,completion\\n            header: the names of the columns
    "a,\\n""b"" c",A\\r\\n            one row: within quotes, line breaks and commas are text
                                   a blank line is no row

Quoting is RFC 4180's: a field that begins with a quotation mark ends with one, and a mark within it
is doubled. A mark anywhere else would leave open where rows end, and refuses the file.
Offsets count decompressed bytes, and begin behind the header.
"""

from __future__ import annotations

import codecs
import csv
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from miles.common import storage
from miles.data.files import contents
from miles.data.files.json_scan import Extent, group_rows, read_chunks
from miles.data.types import MAX_ROW_BYTES, Int64
from miles.errors import SourceError

MAX_HEADER_BYTES = 1 << 20
_BOM = codecs.BOM_UTF8
_QUOTE, _NEWLINE, _RETURN = b'"\n\r'
_DELIMITERS = {"csv": (",", ";", "\t", "|"), "tsv": ("\t",)}
_NAME_CHARACTERS = 200
"""A header's field that is longer is no name of a column."""


@dataclass(frozen=True)
class Header:
    """The first line of a file."""

    names: tuple[str, ...]
    delimiter: str
    num_bytes: int
    """up to the first row, with a byte-order mark"""


def scan(url: str, kind: str, compression: str | None) -> list[Extent]:
    """Find the rows of a file, and join them to row groups.

    Args:
        kind: "csv" or "tsv".

    Raises:
        SourceError: the file is missing or damaged, not UTF-8, without a header, or has a quotation
            mark out of place; the error gives its line.
    """
    with storage.reading(url):
        header = read_header(url, kind, compression)
        chunks = _checked(url, read_chunks(url, compression))
        rows = _Scanner(url, header).rows(chunks)
        return group_rows(rows)


def read_header(url: str, kind: str, compression: str | None) -> Header:
    """Read the names of a file's columns.

    The delimiter of a `.csv` file is a comma, or a semicolon, tab or bar where the header has no
    comma.

    Raises:
        SourceError: the first line is none, or is not text.
    """
    content = b""
    for chunk in read_chunks(url, compression):
        content += chunk
        if len(content) > MAX_HEADER_BYTES or _line_end(content) >= 0:
            break
    if not content.strip():  # a file without rows
        return Header((), ",", len(content))
    contents.require_text(url, content[: contents.HEAD_BYTES], compression, "CSV")
    contents.require_csv(url, content[: contents.HEAD_BYTES], compression)
    bom_bytes = len(_BOM) if content.startswith(_BOM) else 0
    end = _line_end(content)
    line = content[bom_bytes : end if end >= 0 else len(content)]
    if len(line) > MAX_HEADER_BYTES:
        raise _no_header(url, f"it has no end in {MAX_HEADER_BYTES:,} bytes")
    if b"\r" in line.rstrip(b"\r\n").replace(b"\r\n", b""):
        raise SourceError(
            f"{url}: its lines end with a carriage return alone. Save it with line feeds"
        )
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(url, 1, line[error.start]) from error

    delimiter = next((mark for mark in _DELIMITERS[kind] if mark in text), _DELIMITERS[kind][0])
    names = next(csv.reader([text], delimiter=delimiter), [])
    _require_names(url, names)
    return Header(tuple(names), delimiter, end + 1 if end >= 0 else len(content))


@lru_cache(maxsize=64)
def kept_header(url: str, kind: str, compression: str | None, stamp: str) -> Header:
    """Return `read_header`, kept for the last 64 files."""
    return read_header(url, kind, compression)


def split_rows(block: bytes, delimiter: str) -> list[bytes]:
    """Return the rows in the bytes of an extent."""
    scanner = _Scanner("", Header((), delimiter, 0))
    return [block[begin:end] for begin, end in scanner.rows(iter([block]))]


class _Scanner:
    """Finds where rows begin and end, chunk by chunk."""

    def __init__(self, url: str, header: Header) -> None:
        self._url = url
        self._skip_bytes = header.num_bytes
        self._delimiter = ord(header.delimiter)
        self._is_open = False  # the chunk begins within quotes
        self._before = _NEWLINE  # the byte before the chunk
        self._line = 1

    def rows(self, chunks: Iterator[bytes]) -> Iterator[tuple[int, int]]:
        """Yield (begin, end) in bytes of every row that is not blank, without its line's end.

        Raises:
            SourceError: a quotation mark is out of place, or a row is too large.
        """
        base = 0  # the offset of the chunk
        begin = self._skip_bytes
        is_blank = True  # what was seen of the row before the chunk
        for chunk in chunks:
            for newline in self._row_ends(chunk).tolist():
                end = base + newline
                if end < begin:  # of the header
                    continue
                if not (is_blank and _is_blank(chunk, begin - base, newline)):
                    yield begin, end
                begin = end + 1
                is_blank = True

            is_blank = is_blank and _is_blank(chunk, begin - base, len(chunk))
            base += len(chunk)
            if base - begin > MAX_ROW_BYTES:
                raise SourceError(
                    f"{self._url}: the row that begins at byte {begin:,} does not end in "
                    f"{MAX_ROW_BYTES:,} bytes, as where a quotation mark is not closed"
                )
        if self._is_open:
            raise SourceError(
                f"{self._url}: the quotation mark in the row that begins at byte {begin:,} is not "
                "closed when the file ends. It is cut off, or a mark is to be doubled"
            )
        if not is_blank:
            yield begin, base

    def _row_ends(self, chunk: bytes) -> Int64:
        """Return the places of a chunk's line feeds that lie outside of quotes: int64 [rows]."""
        if chunk.startswith(_BOM) and self._line == 1:  # before the first mark, as a delimiter is
            chunk = bytes((self._delimiter,)) * len(_BOM) + chunk[len(_BOM) :]

        content = np.frombuffer(chunk, np.uint8)
        newlines = np.flatnonzero(content == _NEWLINE)
        quotes = np.flatnonzero(content == _QUOTE)
        if len(quotes):
            self._require_places(content, quotes, newlines)
        if len(quotes) or self._is_open:
            num_before = np.searchsorted(quotes, newlines) + self._is_open
            ends = newlines[num_before % 2 == 0]
        else:
            ends = newlines

        self._is_open = bool((len(quotes) + self._is_open) % 2)
        self._before = chunk[-1]
        self._line += len(newlines)
        return ends

    def _require_places(self, content: np.ndarray, quotes: Int64, newlines: Int64) -> None:
        """Refuse a quotation mark that neither begins nor ends a field, nor is doubled.

        Every second mark opens: after a delimiter, a line's end, or the mark that it doubles. The
        others close: before one of these.
        """
        opening = quotes[int(self._is_open) :: 2]
        closing = quotes[1 - int(self._is_open) :: 2]
        before = np.where(opening > 0, content[np.maximum(opening - 1, 0)], self._before)
        # What follows the chunk is not known: its end is taken for a line's.
        last = len(content) - 1
        after = np.where(closing < last, content[np.minimum(closing + 1, last)], _NEWLINE)

        neighbours = np.concatenate([before, after])
        is_wrong = ~np.isin(neighbours, (self._delimiter, _NEWLINE, _RETURN, _QUOTE))
        if is_wrong.any():
            place = np.concatenate([opening, closing])[is_wrong].min()
            raise self._out_of_place(self._line + int(np.searchsorted(newlines, place)))

    def _out_of_place(self, line: int) -> SourceError:
        return SourceError(
            f"{self._url}: line {line:,} has a quotation mark within a field, so that it is not "
            "clear where its row ends. Put the whole field in quotation marks and double the ones "
            'in it: "the 5"" disk"'
        )


def _checked(url: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield chunks, and make sure that they are UTF-8.

    Raises:
        SourceError: they are not; the error gives the line.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    for chunk in itertools.chain(chunks, [b""]):
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            raise _not_utf8(url, line, error.object[error.start]) from error
        line += chunk.count(b"\n")
        if chunk:
            yield chunk


def _is_blank(chunk: bytes, begin: int, end: int) -> bool:
    """Return whether a line, of which a chunk has a part, is empty there."""
    begin = max(begin, 0)
    return end <= begin or (end - begin == 1 and chunk[begin] == _RETURN)


def _line_end(content: bytes) -> int:
    """Return the place of the first line feed outside of quotes; -1: there is none."""
    at = -1
    while (at := content.find(b"\n", at + 1)) >= 0:
        if content.count(b'"', 0, at) % 2 == 0:
            return at
    return -1


def _require_names(url: str, names: list[str]) -> None:
    """Refuse a header that is none.

    Raises:
        SourceError: it says how the first line differs.
    """
    if not any(names):
        raise _no_header(url, "it is empty")
    repeated = [name for number, name in enumerate(names) if name in names[:number]]
    if repeated:
        raise _no_header(url, f"two columns are called {repeated[0][:_NAME_CHARACTERS]!r}")
    if any(len(name) > _NAME_CHARACTERS for name in names):
        raise _no_header(url, f"a field has more than {_NAME_CHARACTERS} characters")


def _no_header(url: str, cause: str) -> SourceError:
    return SourceError(
        f"{url}: its first line is no header: {cause}. Write the names of the columns there, such "
        "as prompt,completion"
    )


def _not_utf8(url: str, line: int, byte: int) -> SourceError:
    return SourceError(
        f"{url}: not UTF-8 text (byte 0x{byte:02x} in line {line:,}). Save it as UTF-8"
    )
