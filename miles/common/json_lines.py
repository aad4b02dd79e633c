r"""Files of JSON lines (fsspec URLs): one JSON object a line, each line ended by "\n".

A process that is killed may leave half a line at the end of a file. It was never complete, so
readers pass over it, and a `PatientFile` cuts it off before it appends more. A run that resumes at
step k writes the lines of steps k, k + 1, … again, so it keeps those `is_before(k)`:

    {"step": 40, …}
    {"step": 41, …}      is_before(41) is false of this line
    {"step": 4           this one is cut off
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from miles.common import storage


def read(url: str) -> list[dict[str, Any]]:
    """Return the objects of a file, parsed; none where there is no file."""
    return [json.loads(line) for line in read_lines(url)]


def read_lines(url: str) -> list[str]:
    """Return the complete lines of a file, without their ends; none where there is no file."""
    return split(url)[0]


def write(url: str, lines: Iterable[str]) -> None:
    """Replace a file; where it is local, in one move."""
    storage.write_text(url, "".join(line + "\n" for line in lines))


def is_before(step: int) -> Callable[[str], bool]:
    """Return whether a line is of a step before this one, as a function of the line."""
    return lambda line: int(json.loads(line)["step"]) < step


def split(url: str) -> tuple[list[str], str]:
    """Return the complete lines of a file, and what follows the last of them."""
    text = storage.read_text(url) if storage.exists(url) else ""
    # Not splitlines(): it also splits at U+2028, which JSON allows inside a text.
    *lines, unfinished = text.split("\n")
    return lines, unfinished
