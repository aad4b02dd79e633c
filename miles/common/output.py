"""The output of a process whose reader may die, and whose disk may fill.

    miles train … | head -3      the run goes on to its end; what it prints then goes nowhere
    miles train … > /full/out    likewise: its log is in the run folder
    miles certify … | head -3    ends quietly: what it prints is all that it makes (`cli.outcome`)

The error stream never ends anything: an error that cannot be printed keeps its exit status.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO, cast

from miles.common.file_errors import cause_of, in_own_words


@contextlib.contextmanager
def outlived(*, is_result: bool = False) -> Iterator[None]:
    """Have what the context prints go nowhere once it cannot be written, instead of ending it.

    The loss of the standard output is reported once, on the error stream.

    Args:
        is_result: the standard output is all that the context makes, so that its loss is an error.
    """
    with contextlib.ExitStack() as stack:
        # Python has None for a stream that was closed before it began (`>&-`).
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stderr(_lasting(sys.stderr or nowhere)))
        stdout = sys.stdout or nowhere
        if not is_result:
            stdout = _lasting(stdout, _report_loss)
        stack.enter_context(contextlib.redirect_stdout(stdout))
        yield


def drop(*descriptors: int) -> None:
    """Have what is written to some files of this process go nowhere: nobody can read it."""
    with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
        for descriptor in descriptors:
            os.dup2(nowhere.fileno(), descriptor)


def _report_loss(error: OSError) -> None:
    where = "the standard output"
    cause = cause_of(error, where)
    reason = cause.text if cause else in_own_words(error)
    if isinstance(error, BrokenPipeError):
        reason = "nobody reads it any more"
    print(f"miles: {where} cannot be written ({reason}); the command goes on", file=sys.stderr)


class _LastingStream:
    """A text stream that raises nothing: once it cannot be written, it leads nowhere.

    Args:
        report: is given the first error.
    """

    def __init__(self, stream: TextIO, report: Callable[[OSError], None]) -> None:
        self._stream = stream
        self._report = report
        self._is_lost = False

    def write(self, text: str) -> int:
        """Write a text, as well as can be."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts, as well as can be."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Pass on what is written so far."""
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, call: Callable[[], object]) -> None:
        if self._is_lost:
            return
        try:
            call()
        except OSError as error:
            self._is_lost = True
            with contextlib.suppress(OSError):  # a stream without a descriptor has nothing to drop
                drop(self._stream.fileno())
                self._stream.flush()  # else Python would try once more at its end, and fail
            self._report(error)


def _lasting(stream: TextIO, report: Callable[[OSError], None] = lambda error: None) -> TextIO:
    """Return a stream that raises nothing; itself, if it is one already."""
    if isinstance(stream, _LastingStream):
        return cast("TextIO", stream)
    return cast("TextIO", _LastingStream(stream, report))
