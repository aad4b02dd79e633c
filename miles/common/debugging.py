"""Errors as a user sees them: one paragraph, or with `MILES_DEBUG=1` all that led to it.

    ds.write("s3://bucket/rows")      WriteError: s3://bucket/rows: cannot be written: no credentials …
    MILES_DEBUG=1                     the same, below the frames and exceptions that caused it

The command line and the notebook go by the same rule. An exception that is none of ours is a mistake
of ours: its paragraph says so, and where it happened.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from miles.common.redact import redact
from miles.errors import MilesError

VARIABLE = "MILES_DEBUG"
_OFF = ("", "0", "false", "no", "off")
_PACKAGE = str(Path(__file__).parents[1])
_MAX_CHARACTERS = 600

_ESCAPE_CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_TRACEBACK = "Traceback (most recent call last)"

P = ParamSpec("P")
T = TypeVar("T")


def is_debugging() -> bool:
    """Return whether tracebacks are asked for: `MILES_DEBUG=1` in the environment, or `--debug`."""
    return os.environ.get(VARIABLE, "").strip().lower() not in _OFF


def show_debugging() -> None:
    """Ask for tracebacks, in this process and in those that it starts."""
    os.environ[VARIABLE] = "1"


def unchained(
    function: Callable[P, T], kinds: tuple[type[Exception], ...] = (MilesError,)
) -> Callable[P, T]:
    """Have a public function raise an error of ours, or Ctrl-C, without its cause and inner frames.

    A generator function stays one. With `MILES_DEBUG=1`, nothing is left out.

    Args:
        kinds: the exceptions that are ours.
    """
    ours: tuple[type[BaseException], ...] = (*kinds, KeyboardInterrupt)
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generate(*args: P.args, **kwargs: P.kwargs) -> Iterator[Any]:
            try:
                yield from function(*args, **kwargs)
            except ours as error:
                if is_debugging():
                    raise
                raise error.with_traceback(None) from None

        return cast("Callable[P, T]", generate)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except ours as error:
            if is_debugging():
                raise
            raise error.with_traceback(None) from None

    return call


def mistake_of_ours(error: BaseException) -> str:
    """Return the paragraph on an exception that no input should be able to cause.

    a mistake in miles, not in your input: KeyError: 'step' (miles/report/report.py:71). Please …
    """
    if isinstance(error, MemoryError):
        return "out of memory: this process asked for more than the machine has free"
    text = one_paragraph(str(error))
    kind = type(error).__name__
    return (
        f"a mistake in miles, not in your input: {kind}{': ' if text else ''}{text}"
        f"{_place_of(error)}. Please report it, with what {VARIABLE}=1 shows: the same command "
        "with its traceback"
    )


def one_paragraph(text: str) -> str:
    """Return a text of another library as one short line: without colours, tracebacks, secrets.

    Of a text with a traceback in it, such as that of a Ray task, the last line is the error.
    """
    plain = redact(_ESCAPE_CODES.sub("", text)).strip()
    if _TRACEBACK in plain:
        plain = plain.splitlines()[-1]
    line = " ".join(plain.split())
    return line if len(line) <= _MAX_CHARACTERS else f"{line[:_MAX_CHARACTERS]}…"


def _place_of(error: BaseException) -> str:
    """Return where in our code an exception came up, " (miles/…:LINE)"; "" where it did not."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(_PACKAGE + os.sep):
            path = Path(frame.filename).relative_to(Path(_PACKAGE).parent)
            return f" ({path}:{frame.lineno})"
    return ""
