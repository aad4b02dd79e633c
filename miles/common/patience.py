"""What a command says while its first answer takes a while: that it works, and at what.

    0 s    miles train …
    2 s    miles: looking at the settings, the places and the rows
    10 s   miles: this takes a while: counting the rows
    14 s   the first answer: from here on, the command speaks for itself

A command that answers within 2 s says nothing of it. Servers that do not answer have lines of their
own (`first_contact.announced`), in place of these.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar

SILENT_SECONDS = 2.0
"""A wait that is longer is announced."""
LONG_SECONDS = 10.0
"""Of a wait that is longer, it is said once what takes so long."""


class _Patience:
    """The two lines of a command, until it is answered."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._doing = ""
        self._others = 0
        """lines that `announced` has in preparation"""
        self._lock = threading.Lock()
        self._has_answer = threading.Event()
        threading.Thread(target=self._speak, name="miles-patience", daemon=True).start()

    def note(self, doing: str) -> None:
        """Note what is done from here on."""
        self._doing = doing

    def end(self) -> None:
        """Say nothing any more."""
        with self._lock:
            self._has_answer.set()

    def add_other(self, number: int) -> None:
        """Count a line of someone else's that is in preparation, or is not any more (-1)."""
        with self._lock:
            self._others += number

    def _speak(self) -> None:
        if self._has_answer.wait(SILENT_SECONDS):
            return
        self._say(self._text)
        if self._has_answer.wait(LONG_SECONDS - SILENT_SECONDS):
            return
        self._say(f"this takes a while: {self._doing or self._text}")

    def _say(self, text: str) -> None:
        """Print a line, unless the answer has come, or another line says more."""
        with self._lock:
            if not self._has_answer.is_set() and not self._others:
                print(f"miles: {text}", file=sys.stderr, flush=True)


_CURRENT: ContextVar[_Patience | None] = ContextVar("patience", default=None)


@contextlib.contextmanager
def until_answered(text: str) -> Iterator[None]:
    """Have a wait in this context announced, until `answered` is called or the context ends.

    Inside of another such context, this one adds nothing.

    Args:
        text: what is done, such as "looking at the rows".
    """
    if _CURRENT.get() is not None:
        yield
        return
    patience = _Patience(text)
    token = _CURRENT.set(patience)
    try:
        yield
    finally:
        patience.end()
        _CURRENT.reset(token)


def answered() -> None:
    """Say nothing more in this context: the command has its first answer."""
    if patience := _CURRENT.get():
        patience.end()


def doing(what: str) -> None:
    """Note what is done from here on, such as "counting the rows"."""
    if patience := _CURRENT.get():
        patience.note(what)


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
