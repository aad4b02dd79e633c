r"""Text files that tell of a run. What cannot be written now is kept, and written later.

A disk that is full or an object store that is down must not end a training for its records. The
lines in memory are the truth, and the file follows them:

    add("a")   add("b")   the disk is full   add("c")   add("d")   there is room   add("e")
    a          a b        (said once)        a b        a b        (said once)     a b c d e

A local file gets each line at once, and what a failed write left of a line is cut off before the
next one. An object store cannot append, and the network is slow: there `flush` writes the file.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from miles.common import json_lines, storage, write_guard
from miles.common.counts import counted
from miles.common.file_errors import cause_of, in_own_words
from miles.common.redact import redact
from miles.errors import LeaseError, MilesError, WriteError

RETRY_SECONDS = 5.0
"""Pause between tries to write a local file that could not be written. `flush` always tries."""

Report = Callable[[str], None]
"""A function that tells the user a sentence."""


class PatientFile:
    """A file of lines that is written as well as can be.

    No method raises where it cannot be written, but `require_written`. Where another run has taken
    the folder over, nothing is written, and all but `close` raise a LeaseError.

    Args:
        url: of the file.
        lines: its lines so far, without their ends, if it is known to hold exactly these.
        report: is told when the file cannot be written, and when it can again.
        stays_open: a local file is opened once for all lines. Close it then.
    """

    def __init__(
        self,
        url: str,
        lines: Sequence[str] = (),
        report: Report = print,
        *,
        stays_open: bool = False,
    ) -> None:
        self.lines = list(lines)
        """every line that the file is to have"""
        self.failure: str | None = None
        """why the last try to write failed; None: it did not"""
        self._url = url
        self._place = storage.place_of(url)
        self._report = report
        self._stays_open = stays_open
        self._is_local = storage.is_local(url)
        self._num_written = len(self.lines)
        self._good_bytes = len(_bytes_of(self.lines))
        self._is_stale = False
        self._stream: BinaryIO | None = None
        self._next_try = 0.0

    @classmethod
    def read(
        cls,
        url: str,
        report: Report = print,
        is_kept: Callable[[str], bool] = lambda line: True,
        *,
        stays_open: bool = False,
    ) -> PatientFile:
        """Continue a file, or begin one; half a line at its end is cut off.

        Args:
            is_kept: whether a line stays.

        Raises:
            MilesError: the file is there and cannot be read.
        """
        found, unfinished = json_lines.split(url)
        file = cls(url, found, report, stays_open=stays_open)
        if unfinished:
            file.replace(found)
        file.keep(is_kept)
        return file

    @property
    def unwritten(self) -> list[str]:
        """Return the lines that the file does not have yet."""
        return self.lines[self._num_written :]

    def add(self, *lines: str) -> None:
        """Add lines to the end."""
        self.lines += lines
        if self._is_local and (self.failure is None or time.monotonic() >= self._next_try):
            self._try(self._catch_up)

    def keep(self, is_kept: Callable[[str], bool]) -> None:
        """Drop the other lines."""
        kept = list(filter(is_kept, self.lines))
        if kept != self.lines:
            self.replace(kept)

    def replace(self, lines: Iterable[str]) -> None:
        """Give the file another content."""
        before = self.lines[: self._num_written]
        self.lines = list(lines)
        # The file stays as it is where it cannot be replaced: these lines it has.
        self._num_written = sum(takewhile(bool, map(str.__eq__, before, self.lines)))
        self._is_stale = True
        self._try(self._write_whole)

    def flush(self) -> None:
        """Write what the file does not have yet."""
        if self._is_stale or not self._is_local:
            if self._is_stale or self.unwritten:
                self._try(self._write_whole)
        elif self.unwritten:
            self._try(self._catch_up)

    def require_written(self) -> None:
        """Make sure that the file has every line: for a file that is a result itself.

        Raises:
            WriteError: it could not be written.
        """
        self.flush()
        if self.failure is not None:
            raise WriteError(
                f"{redact(self._url)}: cannot be written ({self.failure}). Make room there, or "
                "name another folder"
            )

    def close(self) -> None:
        """Write what the file does not have yet; report what it will never have."""
        with contextlib.suppress(LeaseError):  # which ends the run already
            self.flush()
        self._close_stream()
        if self.failure is not None:
            missing = len(self.lines) - self._num_written
            self._report(
                f"{redact(self._url)} could not be written: it lacks its last "
                f"{counted(missing, 'line')} "
                f"({self.failure})"
            )

    def _try(self, write: Callable[[], None]) -> None:
        """Write, and report a change: it fails for the first time, or works again."""
        write_guard.require(self._place)
        try:
            write()
        except LeaseError:
            raise
        # Every filesystem has its own exceptions (botocore, httpx, OSError).
        except Exception as error:
            self._close_stream()
            self._next_try = time.monotonic() + RETRY_SECONDS
            is_new = self.failure is None
            self.failure = _cause_in_words(error, self._url)
            if is_new:
                self._report(
                    f"{redact(self._url)} cannot be written ({self.failure}); the run goes on, and "
                    "keeps the lines until they can be"
                )
            return

        kept = len(self.lines) - self._num_written
        self._num_written = len(self.lines)
        self._is_stale = False
        if self.failure is not None:
            self.failure = None
            self._report(
                f"{redact(self._url)} is written again, with {counted(kept, 'line')} kept so far"
            )

    def _catch_up(self) -> None:
        """Append the lines that a local file does not have."""
        if self._is_stale:
            self._write_whole()
            return
        if self._stream is None:
            self._stream = self._open_stream()
        content = _bytes_of(self.unwritten)
        rest = memoryview(content)
        while rest:  # unbuffered: a disk that fills up takes a part, and then says why
            rest = rest[self._stream.write(rest) :]
        self._good_bytes += len(content)
        if not self._stays_open:
            self._close_stream()

    def _open_stream(self) -> BinaryIO:
        """Open the local file at the end of its last good line."""
        path = Path(storage.filesystem(self._url)[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size if path.exists() else 0
        if size < self._good_bytes:  # somebody removed it, or a part of it
            self._write_whole()
            self._num_written = len(self.lines)
        stream = open(path, "ab", buffering=0)  # noqa: SIM115
        if size > self._good_bytes:
            os.truncate(path, self._good_bytes)
        return stream

    def _write_whole(self) -> None:
        """Write all lines; a local file is replaced in one move."""
        self._close_stream()
        # After a failure, no checkpoint waits for pauses and further tries.
        max_tries = 1 if self.failure is not None else None
        content = _bytes_of(self.lines)
        storage.write_text(self._url, content.decode(), max_tries)
        self._good_bytes = len(content)

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _bytes_of(lines: Iterable[str]) -> bytes:
    return "".join(line + "\n" for line in lines).encode()


def _cause_in_words(error: Exception, url: str) -> str:
    """Return why a file could not be written, on one line."""
    origin = error.__cause__ if isinstance(error, MilesError) and error.__cause__ else error
    cause = cause_of(origin, url)
    return cause.text if cause else in_own_words(origin)
