"""A text that hides itself: a key that a run needs and that nothing may show or store.

Secret("abc123")                 printed, in an f-string, in JSON, in a traceback: (hidden)
Secret("abc123").reveal()        "abc123"
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

SHOWN = "(hidden)"
"""A secret's stand-in where one would be shown."""


class Secret:
    """A text that is shown as `(hidden)`. It cannot be pickled, so it stays in its process."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text."""
        return self._text

    def __bool__(self) -> bool:
        return bool(self._text)

    def __repr__(self) -> str:
        return SHOWN

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __deepcopy__(self, memo: Any) -> Secret:  # dataclasses.asdict copies what it returns
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not pickled: reveal it where it is needed")


def hide_in_command_line(flags: Collection[str]) -> None:
    """Overwrite the values of flags in this process's command line, as `ps` shows it.

    Ray 2.60 copies the command line of a driver into the cluster's list of jobs. Python's own copy
    (`sys.argv`) stays. On other systems than Linux it does nothing.

    Args:
        flags: with their dashes; the value is the next word, or stands behind `=`.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        # proc(5), /proc/pid/stat: fields 48 and 49 are where the arguments begin and end.
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        start, end = int(fields[45]), int(fields[46])
        line = Path("/proc/self/cmdline").read_bytes()
        if start > 0 and len(line) == end - start:
            for place, length in _value_places(line, flags):
                ctypes.memset(start + place, ord("x"), length)


def _value_places(line: bytes, flags: Collection[str]) -> list[tuple[int, int]]:
    """Return where the values of flags begin in a command line, and their lengths in bytes.

    Args:
        line: the words, each with a zero byte behind it.
    """
    places = []
    begin = 0
    is_value = False
    for word in line.split(b"\0"):
        flag, equals, value = word.partition(b"=")
        is_flag = flag.decode(errors="replace") in flags
        if is_value:
            places.append((begin, len(word)))
        elif is_flag and equals:
            places.append((begin + len(flag) + 1, len(value)))

        is_value = is_flag and not equals and not is_value
        begin += len(word) + 1
    return places
