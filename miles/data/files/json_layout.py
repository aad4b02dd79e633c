"""The layout of a JSON file's rows, told from its beginning.

    {"a": 1}\n{"a": 2}\n                  LINES    one row a line: a broken line is a broken row
    [{"a": 1},\n {"a": 2}]                ARRAY    one array of rows
    {\n "a": 1\n}\n{\n "a": 2\n}          VALUES   rows one after the other, however they are broken
    {"a": 1}{"a": 2}    {"a": 1},\n…               into lines, with or without commas
    {"version": 1, "data": [{"a": 1}, …]} WRAPPED  one object, which holds the rows in a list

A file is LINES unless its first row says otherwise. Whether one object is a row, or holds rows, its
keys tell (`json_objects`), and that nothing follows it.
"""

from __future__ import annotations

import codecs
import enum
import json
from collections.abc import Iterator
from dataclasses import dataclass

from miles.data.files import json_objects

PEEK_BYTES = 4 << 20
"""A first row of more is not decoded to tell the layout."""

BOM = codecs.BOM_UTF8
# Numbers stay text: their value does not matter here, and Python refuses integers of over 4,300
# digits.
DECODER = json.JSONDecoder(parse_int=str, parse_float=str)
CUT_TOKEN = 16
"""An error this close to the buffer's end may only mean that a token was cut: -Infinity,
\\ud83d."""


class Layout(enum.Enum):
    """The place of the rows in a JSON file."""

    LINES = "lines"
    ARRAY = "array"
    VALUES = "values"
    WRAPPED = "wrapped"


@dataclass(frozen=True)
class Finding:
    """A layout, and what goes with it."""

    layout: Layout
    key: str = ""
    """of `WRAPPED`: the key of the list that holds the rows"""
    if_not_alone: Layout = Layout.LINES
    """of `WRAPPED`: the layout where something follows the object"""
    fault: str = ""
    """why the one object of the file is no row, and what to do; "" where nothing is wrong"""


@dataclass(frozen=True)
class Head:
    """The beginning of a file."""

    content: bytes
    """from byte `start` on; it has a character that is not space, unless the file has none"""
    start: int
    """Neither a byte-order mark nor the space before counts: a small compressed file may hold
    gigabytes of it."""
    num_lines: int
    """newlines before `start`"""
    found: Finding


def read_head(chunks: Iterator[bytes]) -> Head:
    """Read the beginning of a file.

    Args:
        chunks: the file's content, of which as much is taken as the head has.
    """
    first, start, num_lines = _first_content(chunks)
    begin = first.lstrip()
    if begin[:1] == b"[":
        return Head(first, start, num_lines, Finding(_layout_of_list(begin)))

    beginning = _Beginning(first, chunks)
    found = _layout_of(beginning)
    return Head(beginning.content, start, num_lines, found)


def _first_content(chunks: Iterator[bytes]) -> tuple[bytes, int, int]:
    """Read up to the first character that is not space.

    Returns:
        the chunk that holds it, the byte at which that chunk begins, and the newlines before.
    """
    head = b""
    start = 0
    num_lines = 0
    is_first = True
    for chunk in chunks:
        head += chunk
        if is_first and len(head) < len(BOM) and BOM.startswith(head):
            continue
        if is_first and head.startswith(BOM):
            start = len(BOM)
            head = head[start:]
        is_first = False

        if head.strip():
            break
        start += len(head)
        num_lines += head.count(b"\n")
        head = b""
    return head, start, num_lines


class _Beginning:
    """The content of a file from its first row on, of which more is read where it is needed."""

    def __init__(self, content: bytes, chunks: Iterator[bytes]) -> None:
        self.content = content
        self._chunks = chunks

    @property
    def is_full(self) -> bool:
        """Return whether no more is looked at."""
        return len(self.content) >= PEEK_BYTES

    def read_on(self) -> bool:
        """Read about as much as there is; return False where the file or the limit is reached."""
        if self.is_full:
            return False
        parts = [self.content]
        wanted = len(self.content)
        for chunk in self._chunks:
            parts.append(chunk)
            wanted -= len(chunk)
            if wanted <= 0:
                break
        self.content = b"".join(parts)
        return len(parts) > 1

    def next_from(self, at: int) -> tuple[bytes, int]:
        """Return the first byte from `at` on that is not space, and where it is.

        It is b"" where the file ends before, or nothing but space comes for long.
        """
        while True:
            rest = self.content[at:]
            found = rest.lstrip()
            if found:
                return found[:1], len(self.content) - len(found)
            if not self.read_on():
                return b"", len(self.content)


def _layout_of(beginning: _Beginning) -> Finding:
    """Return how a file that does not begin with [ lays out its rows."""
    first, at = beginning.next_from(0)
    if first != b"{":
        return Finding(Layout.LINES)

    line_end = _line_end(beginning, at)
    if line_end is not None and _is_value(beginning.content[at:line_end]):
        if beginning.next_from(line_end)[0]:
            return Finding(Layout.LINES)
        return _of_one_object(beginning.content[at:line_end], Layout.LINES)

    end = _value_end(beginning, at)
    if end is None:
        return Finding(Layout.LINES)  # the first line is broken
    if end < 0:
        # Longer than what is looked at. One long line may have any row in it.
        is_line = line_end is None
        otherwise = Layout.LINES if is_line else Layout.VALUES
        found = _of_one_object(beginning.content[at:], otherwise)
        return Finding(Layout.LINES) if is_line and found.fault else found

    following, comma = beginning.next_from(end)
    if not following:
        is_line = b"\n" not in beginning.content[at:end]
        otherwise = Layout.LINES if is_line else Layout.VALUES
        return _of_one_object(beginning.content[at:end], otherwise)
    if following == b",":
        following = beginning.next_from(comma + 1)[0] or b"{"
    return Finding(Layout.VALUES if following == b"{" else Layout.LINES)


def _of_one_object(content: bytes, otherwise: Layout) -> Finding:
    """Return the layout of a file with one object.

    Args:
        content: the object, or its beginning.
        otherwise: the layout where the object is a row.
    """
    found = json_objects.look_into(content.decode("latin-1"), DECODER)
    if isinstance(found, json_objects.HeldRows):
        return Finding(Layout.WRAPPED, found.key, otherwise)
    return Finding(otherwise, fault="" if found is None else found.text)


def _line_end(beginning: _Beginning, at: int) -> int | None:
    """Return where the line at a byte ends; None: not within what is looked at."""
    while True:
        newline = beginning.content.find(b"\n", at)
        if newline >= 0:
            return newline
        if not beginning.read_on():
            return None


def _is_value(line: bytes) -> bool:
    try:
        DECODER.decode(line.decode("latin-1").strip(" \t\r"))
    except (ValueError, RecursionError):
        return False
    return True


def _value_end(beginning: _Beginning, at: int) -> int | None:
    """Return where the value at a byte ends; -1: beyond what is looked at; None: it is broken."""
    while True:
        text = beginning.content.decode("latin-1")
        try:
            return DECODER.raw_decode(text, at)[1]
        except RecursionError:
            return None
        except json.JSONDecodeError as error:
            if not is_cut(error, len(text)):
                return None
        if not beginning.read_on():
            return -1 if beginning.is_full else None


def is_cut(error: json.JSONDecodeError, num_characters: int) -> bool:
    """Return whether an error may come from the end of the text alone."""
    return error.msg.startswith("Unterminated") or error.pos >= num_characters - CUT_TOKEN


def _layout_of_list(head: bytes) -> Layout:
    """Return the layout of a file that begins with [: lines may begin with a list, too."""
    line, _, rest = head.partition(b"\n")
    is_array = rest.lstrip()[:1] not in (b"{", b"[") or not _is_value(line)
    return Layout.ARRAY if is_array else Layout.LINES
