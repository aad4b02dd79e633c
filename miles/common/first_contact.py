"""The first call to a server: it says what it waits for, and does not wait long for nobody.

    0 s    hf://datasets/x  ──  no such host, tried again after pauses
    2 s    miles: waiting for hf://datasets/x, which does not answer yet
    4 s    SourceError: hf://datasets/x: cannot be read, tried 4 times: … Check the network …

Later calls, in a run, are more patient (`retry`): a server that was there once will return.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar

from miles.common.patience import others_speak
from miles.common.redact import redact

SILENT_SECONDS = 2.0
"""A server that takes longer to answer is named."""
MAX_UNREACHABLE_SECONDS = 3.0
"""No try begins later than this where nobody is reached."""

_IS_FIRST: ContextVar[bool] = ContextVar("is_first_contact", default=False)


def is_first_contact() -> bool:
    """Return whether this thread is in a `first_contact`."""
    return _IS_FIRST.get()


@contextlib.contextmanager
def first_contact() -> Iterator[None]:
    """Have the calls to servers in this context, and thread, announce themselves and give up soon."""
    token = _IS_FIRST.set(True)
    try:
        yield
    finally:
        _IS_FIRST.reset(token)


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Say on the error stream that something is waited for, once that has taken a while."""
    is_over = threading.Event()

    def announce() -> None:
        if not is_over.is_set():
            print(
                f"miles: waiting for {redact(what)}, which does not answer yet",
                file=sys.stderr,
                flush=True,
            )

    timer = threading.Timer(SILENT_SECONDS, announce)
    timer.daemon = True
    timer.start()
    try:
        with others_speak():
            yield
    finally:
        is_over.set()
        timer.cancel()
