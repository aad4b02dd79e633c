"""Rows as JSON values in a text that slides by: where each begins and ends, in bounded memory.

    [{"a": 1},\n {"a": 2}]                an array's elements
    {"a": 1}{"a": 2}    {"a": 1},\n…      values one after the other
    {"version": 1, "data": [{"a": 1}, …]} the elements of a list within an object

The text is decoded as Latin-1, where one byte is one character: positions are byte offsets, and a
UTF-8 character may be cut anywhere. A comma may follow the last value. A broken value has no end
that could be found, so it is an error of the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from miles.common.json_faults import described, likely_fault
from miles.data.files.json_layout import CUT_TOKEN, DECODER, Layout, is_cut
from miles.data.files.raw_values import raw_values
from miles.errors import SourceError

MAX_ELEMENT_BYTES = 256 << 20
"""An element that is longer is taken for one that is not closed."""

_SPACE = re.compile(r"[ \t\n\r]*")
_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
_BEGINNING = re.compile(r'\{\s*"[^"\\]{0,200}"')
"""An object as far as its first key."""


class NotOneObjectError(Exception):
    """A text follows the object that was taken for all of the file."""


class ValueScanner:
    """Finds the rows of a text, over a buffer that slides along the file.

    Args:
        url: of the file, for errors.
        chunks: the file's content from byte `start` on, which is where the rows or the space before
            them begin.
        start: a byte.
        num_lines: newlines before that byte.
    """

    def __init__(self, url: str, chunks: Iterator[bytes], start: int, num_lines: int = 0) -> None:
        self._url = url
        self._chunks = chunks
        self._text = ""
        self._base = start  # text[0] is this byte of the file
        self._num_lines = num_lines  # newlines before text[0]
        self._at = 0  # the cursor, in the text
        self._num_rows = 0
        self._border = ""  # the end of an element, a comma, and the beginning of the next element
        self._last_try = -1  # the base of the text that was searched for many rows

    def rows(self, layout: Layout, key: str = "") -> Iterator[tuple[int, int]]:
        """Yield (begin, end) in bytes of every row.

        Args:
            layout: any but LINES.
            key: of an object, the one that holds the rows.

        Raises:
            SourceError: a value is broken, or text follows the end.
            NotOneObjectError: text follows the object of `WRAPPED`.
        """
        if layout is Layout.VALUES:
            yield from self._values()
        elif layout is Layout.WRAPPED:
            yield from self._held(key)
        else:
            yield from self._elements()
            if not self._is_at_end():
                raise self._broken(self._at, "text after the array's end")

    def _values(self) -> Iterator[tuple[int, int]]:
        """Yield the places of values that follow one another."""
        while not self._is_at_end():
            yield self._row()
            if not self._is_at_end() and self._text[self._at] == ",":
                self._at += 1

    def _elements(self) -> Iterator[tuple[int, int]]:
        """Yield the places of an array's elements, and move behind it."""
        self._take("[")
        following = self._next_character()
        while following != "]":
            rows = self._many_rows()
            if rows:
                yield from rows
            else:
                yield self._row()

            end = self._base + self._at
            following = self._next_character()
            if following == ",":
                self._at += 1
                following = self._next_character()
                self._note_border(end)
            elif following != "]":
                raise self._broken(self._at, "expected a comma or ]")
        self._at += 1

    def _held(self, key: str) -> Iterator[tuple[int, int]]:
        """Yield the places of the elements of a list in an object, and move behind the object."""
        self._take("{")
        is_found = False
        while self._next_character() != "}":
            end = self._value_end()  # the cursor may have moved with the buffer
            name = json.loads(self._text[self._at : end].encode("latin-1"))
            self._at = end
            self._take(":")

            if name == key and not is_found:
                is_found = True
                yield from self._elements()
            elif self._next_character() == "[" and self._is_list_of_objects():
                raise SourceError(
                    f"{self._url}: one object that holds several lists of objects, under {key!r} "
                    "and another key: which of them are the rows is not clear. Write each list to "
                    "a file of its own, and name those to train on"
                )
            else:
                self._at = self._value_end()
            if self._next_character() != "}":
                self._take(",", "expected a comma or }")
        self._at += 1

        if not self._is_at_end():
            raise NotOneObjectError

    def _is_list_of_objects(self) -> bool:
        """Return whether the list at the cursor begins with an object."""
        while True:
            found = skip_space(self._text, self._at + 1)
            if found < len(self._text):
                return self._text[found] == "{"
            if not self._read_on():
                return False

    def _note_border(self, end: int) -> None:
        """Remember what lies between two rows: the next ones will have the same between them.

        Args:
            end: the byte behind the row before the cursor.
        """
        begin = end - self._base - 1
        if not self._border and begin >= 0:
            first_key = _BEGINNING.match(self._text, self._at)
            self._border = self._text[begin : first_key.end() if first_key else self._at + 1]

    def _many_rows(self) -> list[tuple[int, int]]:
        """Find the rows from the cursor to the last border in the text, and move behind them.

        Returns:
            (begin, end) in bytes of each; none where they are not found at once.
        """
        if not self._border or self._last_try == self._base:
            return []
        self._last_try = self._base
        end = self._text.rfind(self._border, self._at) + 1
        if end <= self._at:
            return []
        # The border may lie within a row; then what is before it is no list of values.
        values = raw_values(self._text[self._at : end].encode("latin-1"))
        if not values:
            return []

        spans = []
        for value in values:
            length = len(memoryview(value))
            spans.append((self._base + self._at, self._base + self._at + length))
            self._at += length
            comma = _COMMA.match(self._text, self._at, end)
            if comma is not None:
                self._at = comma.end()
        self._num_rows += len(spans)
        return spans

    def _row(self) -> tuple[int, int]:
        """Decode the row at the cursor and move behind it."""
        end = self._value_end()
        span = self._base + self._at, self._base + end
        self._at = end
        self._num_rows += 1
        return span

    def _value_end(self) -> int:
        """Return where the value at the cursor ends, reading on while it may be cut."""
        while True:
            try:
                _, end = DECODER.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise self._broken(self._at, "nested too deeply") from error
            except json.JSONDecodeError as error:
                if self._may_be_cut(error) and self._read_on():
                    continue
                likely = likely_fault(error, self._text)
                raise self._broken(error.pos, described(error.msg, likely)) from error

            # The beginning of a number may be a number too: 1.5 of 1.5e-7.
            is_number = self._text[self._at] in "-0123456789"
            if is_number and end >= len(self._text) - CUT_TOKEN and self._read_on():
                continue
            return end

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        return is_cut(error, len(self._text)) and len(self._text) - self._at < MAX_ELEMENT_BYTES

    def _take(self, character: str, expected: str = "") -> None:
        if self._next_character() != character:
            raise self._broken(self._at, expected or f"expected {character}")
        self._at += 1

    def _next_character(self) -> str:
        """Move to the next character that is not space, and return it."""
        if self._is_at_end():
            raise self._broken(self._at, "the file ends before the array or object does")
        return self._text[self._at]

    def _is_at_end(self) -> bool:
        """Move behind space; return whether the file ends there."""
        while True:
            self._at = skip_space(self._text, self._at)
            if self._at < len(self._text):
                return False
            if not self._read_on():
                return True

    def _read_on(self) -> bool:
        """Drop what lies before the cursor, and read more; return False at the end of the file.

        The rest at least doubles, so that a long value costs linear time.
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

        self._num_lines += self._text.count("\n", 0, self._at)
        self._text = "".join(parts)
        self._base += self._at
        self._at = 0
        return True

    def _broken(self, at: int, what: str) -> SourceError:
        """Return the error for what is wrong at a position of the text."""
        return SourceError(
            f"{self._url}: broken JSON at {self._place(at)}: {what}, in row {self._num_rows} "
            f"(counting from 0), which begins at {self._place(self._at)}. Nothing after it can be "
            "read: mend the file, or make it JSON lines, where a broken row is dropped by itself"
        )

    def _place(self, at: int) -> str:
        line = self._num_lines + self._text.count("\n", 0, at) + 1
        return f"byte {self._base + at} (line {line})"


def skip_space(text: str, at: int) -> int:
    """Return the position of the next character that is no space of JSON's."""
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()
