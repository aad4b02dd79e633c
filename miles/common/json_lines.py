r"""Files of JSON lines (fsspec URLs): one JSON object a line, each line ended by "\n".

A process that is killed may leave half a line at the end of a file. It was never complete, so
readers pass over it, and `repair` cuts it off before more lines are appended. A run that resumes
at step k writes the lines of steps k, k + 1, … again, so `keep_before` drops them first:

    {"step": 40, …}
    {"step": 41, …}      keep_before(url, 41) drops this line
    {"step": 4           … and this one
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from miles.common import storage


def read(url: str) -> list[dict[str, Any]]:
    """Return the objects of a file, parsed; none where there is no file."""
    return [json.loads(line) for line in read_lines(url)]


def read_lines(url: str) -> list[str]:
    """Return the complete lines of a file, without their ends; none where there is no file."""
    return _split(url)[0]


def write(url: str, lines: Iterable[str]) -> None:
    """Replace a file; where it is local, in one move."""
    storage.write_text(url, "".join(line + "\n" for line in lines))


def append(url: str, lines: Sequence[str], earlier: Sequence[str]) -> None:
    """Add lines to a file.

    Args:
        url: of the file; its folder is created if need be.
        lines: to add.
        earlier: the lines that the file has. An object store cannot append, so there all are
            written.
    """
    if not storage.is_local(url):
        write(url, [*earlier, *lines])
        return
    storage.require_writable(url)
    path = Path(storage.filesystem(url)[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write("".join(line + "\n" for line in lines))


def repair(url: str) -> list[str]:
    """Cut off half a line at the end of a file, if there is one; return the complete lines."""
    lines, unfinished = _split(url)
    if unfinished:
        write(url, lines)
    return lines


def keep_before(url: str, step: int) -> list[str]:
    """Drop the lines of this step and of later ones from a file; return those that stay."""
    lines = repair(url)
    kept = [line for line in lines if json.loads(line)["step"] < step]
    if kept != lines:
        write(url, kept)
    return kept


def _split(url: str) -> tuple[list[str], str]:
    """Return the complete lines of a file, and what follows the last of them."""
    text = storage.read_text(url) if storage.exists(url) else ""
    # Not splitlines(): it also splits at U+2028, which JSON allows inside a text.
    *lines, unfinished = text.split("\n")
    return lines, unfinished
