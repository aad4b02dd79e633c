"""The words of a command while it works: what it does from the first moment on, what took long.

    on a terminal   one line that changes in place, and goes when the work is done
                      certifying the tokenizer · 4 s
                    what took long stays
                      certifying the tokenizer: 6 s
    in a pipe       a line for each work that lasts, and for what took long
                      miles: certifying the tokenizer
                      miles: certifying the tokenizer took 6 s

In a pipe, a command whose works last less than a second each says nothing of them. Servers that do
not answer have lines of their own (`first_contact.announced`), in place of these.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TextIO, cast

SILENT_SECONDS = 1.0
"""In a pipe, a work that lasts longer has a line."""
SHOWN_SECONDS = 0.2
"""On a terminal, a work that lasts longer is seen: others would only flicker."""
COUNTED_SECONDS = 2.0
"""On a terminal, the seconds of a work that lasts longer are counted."""
LONG_SECONDS = 5.0
"""The seconds of a work that took longer are told at its end."""
_TICK_SECONDS = 0.2

_ERASE_LINE = "\r\x1b[K"


class _Patience:
    """The works of a command, one after another, and the thread that shows them.

    Args:
        is_live: a line can change in place.
    """

    def __init__(self, *, is_live: bool) -> None:
        self._is_live = is_live
        self._terminal = sys.stderr if is_live else None
        """the stream itself: `sys.stderr` is one that watches, later on"""
        self._work = ""
        self._since = time.monotonic()
        self._is_shown = False
        """the line of the work has been printed, or is drawn"""
        self._is_drawn = False
        """a line is to be erased before anything else is printed"""
        self._is_within_line = False
        """what was printed last has not ended its line: nothing is drawn there"""
        self._num_others = 0
        """lines that `announced` has in preparation"""
        self._lock = threading.RLock()
        self._is_over = threading.Event()
        threading.Thread(target=self._show_all, name="miles-patience", daemon=True).start()

    def begin(self, work: str, *, is_long: bool = False) -> None:
        """End the work before, and begin one. In a pipe, one that `is_long` has its line at once."""
        with self._lock:
            if work == self._work:
                return
            self.pause()
            self._work = work
            self._since = time.monotonic()
            if is_long and not self._is_live:
                self._print(work)

    def pause(self) -> None:
        """End the work. If it took long, its seconds are told."""
        with self._lock:
            self.erase()
            seconds = time.monotonic() - self._since
            if self._work and self._is_shown and seconds >= LONG_SECONDS:
                took = f"  {self._work}: " if self._is_live else f"miles: {self._work} took "
                self._write(f"{took}{seconds:.0f} s\n")
            self._work = ""
            self._is_shown = False

    def end(self) -> None:
        """Say nothing any more."""
        with self._lock:
            self.pause()
            self._is_over.set()

    def add_other(self, number: int) -> None:
        """Count a line of someone else's that is in preparation, or is not any more (-1)."""
        with self._lock:
            self.erase()
            self._num_others += number

    def erase(self) -> None:
        """Remove the line that is drawn, if one is: something else is printed."""
        with self._lock:
            if self._is_drawn:
                self._write(_ERASE_LINE)
                self._is_drawn = False

    def print_on(self, stream: TextIO, text: str) -> int:
        """Print something else on the terminal, in a place of its own."""
        with self._lock:
            self.erase()
            if text:
                self._is_within_line = not text.endswith("\n")
            return stream.write(text)

    def _show_all(self) -> None:
        while not self._is_over.wait(_TICK_SECONDS):
            with self._lock:
                self._show()

    def _show(self) -> None:
        """Draw or print the work, if it has lasted."""
        seconds = time.monotonic() - self._since
        if not self._work or self._num_others or self._is_over.is_set():
            return
        if self._is_live and seconds >= SHOWN_SECONDS and not self._is_within_line:
            count = f" · {seconds:.0f} s" if seconds >= COUNTED_SECONDS else ""
            most = shutil.get_terminal_size().columns - len(count) - 3
            # The cursor waits at the beginning: what another process prints begins there.
            self._write(f"{_ERASE_LINE}  {self._work[:most]}{count}\r")
            self._is_drawn = self._is_shown = True
        is_due = not self._is_live and not self._is_shown
        if is_due and seconds >= SILENT_SECONDS:
            self._print(self._work)

    def _write(self, text: str) -> None:
        stream = self._terminal or _plain_stream()
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
            stream.write(text)
            stream.flush()

    def _print(self, work: str) -> None:
        self._write(f"miles: {work}\n")
        self._is_shown = True


class _Watched:
    """A text stream of the terminal: what is drawn is erased before anything is written there."""

    def __init__(self, watched: TextIO, patience: _Patience) -> None:
        self.watched = watched
        self._patience = patience

    def write(self, text: str) -> int:
        """Write a text in a place of its own."""
        return self._patience.print_on(self.watched, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.watched, name)


_CURRENT: ContextVar[_Patience | None] = ContextVar("patience", default=None)


@contextlib.contextmanager
def until_answered(text: str) -> Iterator[None]:
    """Show what is done in this context, from `text` on, until it ends.

    Inside of another such context, this one adds nothing.

    Args:
        text: what is done first, such as "looking at the rows".
    """
    if _CURRENT.get() is not None:
        yield
        return

    is_live = _is_live()
    patience = _Patience(is_live=is_live)
    patience.begin(text)
    token = _CURRENT.set(patience)
    try:
        with _watched(patience) if is_live else contextlib.nullcontext():
            yield
    finally:
        patience.end()
        _CURRENT.reset(token)


def answered() -> None:
    """Say nothing more in this context, until something else is done: the command speaks itself."""
    if patience := _CURRENT.get():
        patience.pause()


def doing(what: str, *, is_long: bool = False) -> bool:
    """Show what is done from here on, such as "counting the rows".

    Args:
        is_long: it is known to take seconds, and has its line in a pipe at once.

    Returns:
        whether anybody is shown it: inside of `until_answered`.
    """
    patience = _CURRENT.get()
    if patience is not None:
        patience.begin(what, is_long=is_long)
    return patience is not None


@contextlib.contextmanager
def others_speak() -> Iterator[None]:
    """Leave the word to a line that says more, for the time of this context."""
    patience = _CURRENT.get()
    if patience is not None:
        patience.add_other(1)
    try:
        yield
    finally:
        if patience is not None:
            patience.add_other(-1)


def _plain_stream() -> TextIO:
    """Return where lines go that stay: the error stream, which a notebook would paint as an error."""
    from miles.common.progress import is_notebook

    return sys.stdout if is_notebook() else sys.stderr


def _is_live() -> bool:
    """Return whether a line can change in place, and nothing else is printed onto it unseen."""
    streams = (sys.stdout, sys.stderr)
    are_terminals = all(getattr(stream, "isatty", lambda: False)() for stream in streams)
    return are_terminals and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


@contextlib.contextmanager
def _watched(patience: _Patience) -> Iterator[None]:
    """Have all that Python prints in the context stand in lines of its own."""
    stdout = cast("TextIO", _Watched(sys.stdout, patience))
    stderr = cast("TextIO", _Watched(sys.stderr, patience))
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        yield
