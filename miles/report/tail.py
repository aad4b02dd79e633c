"""Reading a file of JSON lines that grows: each look reads only what was appended since the last.

    the file         look 1       look 2          look 3
    a b c            a b c
    a b c d (half)                (nothing yet)
    a b c d e                                     d e
    a b x            the run went back to its checkpoint: all is read again

The end of what was read is looked at again each time. Where it has another content, or is gone, the
file is another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from miles.common import own_files, storage
from miles.errors import BrokenFileError, MissingFileError

_ANCHOR_BYTES = 2_048
"""Bytes at the end of what was read that must be there again. A line has times in it, so that no
two lines of a run are the same."""


class GrowingFile:
    """A file of JSON lines, read as it grows.

    Args:
        url: of the file (fsspec); it may not be there yet.
        add: is given each new line.
        restart: is called when the lines so far hold no more, before the first line comes again.
    """

    def __init__(
        self, url: str, add: Callable[[dict[str, Any]], None], restart: Callable[[], None]
    ) -> None:
        self._url = url
        self._add = add
        self._restart = restart
        self._num_bytes = 0
        self._anchor = b""
        self.num_bytes_read = 0
        """of all looks together"""

    def look(self) -> bool:
        """Read what was appended; return whether there is anything new.

        Raises:
            SourceError: the file cannot be read.
        """
        content = self._new_content()
        if content is None:
            has_lost_lines = self._num_bytes > 0
            self._num_bytes = 0
            self._anchor = b""
            self._restart()
            content = self._new_content() or b""
            return self._take(content) or has_lost_lines
        return self._take(content)

    def _new_content(self) -> bytes | None:
        """Return the bytes behind those that were read; None where the file is another one."""
        try:
            size = storage.size_of(self._url, storage.info(self._url))
        except MissingFileError:
            return None if self._num_bytes else b""
        if size < self._num_bytes:
            return None

        begin = self._num_bytes - len(self._anchor)
        content = storage.RangeFile(self._url, size).read_range(begin, size)
        self.num_bytes_read += len(content)
        if not content.startswith(self._anchor):
            return None
        return content[len(self._anchor) :]

    def _take(self, content: bytes) -> bool:
        """Pass on the whole lines of what was read; half a line waits for its end."""
        whole, newline, _ = content.rpartition(b"\n")
        if not newline:
            return False
        for line in whole.split(b"\n"):
            try:
                self._add(own_files.object_of(line, self._url, "step", "sft/loss"))
            except BrokenFileError:
                continue  # `miles report` without --live names such lines
        self._num_bytes += len(whole) + 1
        self._anchor = (self._anchor + whole + b"\n")[-_ANCHOR_BYTES:]
        return True
