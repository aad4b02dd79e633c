r"""Our own files, read back: named with what is wrong where one is not what was written.

A disk loses a block, a copy ends in the middle, a newer version has another form. So:

    read_object("run/ledger.json")     a JSON object, or BrokenFileError: run/ledger.json: cut off …
    read_records("run/starts.jsonl")   its readable lines, and the numbers of the others
    mend("run/starts.jsonl")           the file keeps its readable lines; all of it lies beside it,
                                       as starts.jsonl.broken

What a run needs to go on is refused where it is broken. What only tells of the run is mended, said
once, and ends nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from miles.common import storage
from miles.errors import BrokenFileError, SourceError

_SHOWN_NUMBERS = 5
_NAMES = {dict: "a JSON object", list: "a list", str: "a text", type(None): "null"}

Form = Sequence[str]
"""Keys that an object must have. Of several forms, it must have all keys of one."""


@dataclass(frozen=True)
class Records:
    """A file of JSON lines as far as it can be read."""

    lines: tuple[str, ...] = ()
    """without their ends; half a line at the end of the file is not among them"""
    objects: tuple[dict[str, Any], ...] = ()
    """of these lines"""
    broken: tuple[int, ...] = ()
    """the numbers, from 1, of complete lines that cannot be read"""
    is_cut_off: bool = False
    """the file ends with half a line"""

    @property
    def broken_text(self) -> str:
        """Return which lines cannot be read: "line 3", "lines 3, 4 and 20 more"."""
        shown = ", ".join(map(str, self.broken[:_SHOWN_NUMBERS]))
        more = len(self.broken) - _SHOWN_NUMBERS
        rest = f" and {more} more" if more > 0 else ""
        return f"line{'s' if len(self.broken) > 1 else ''} {shown}{rest}"


def read_object(url: str, *keys: str) -> dict[str, Any]:
    """Return the JSON object of a file.

    Args:
        url: of the file.
        keys: that it must have.

    Raises:
        MissingFileError: no such file.
        BrokenFileError: it is cut off, or is not what was written.
        SourceError: it cannot be read.
    """
    return object_of(storage.read_bytes(url), url, *keys)


def object_of(content: bytes, where: str, *keys: str) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Args:
        where: names the file in errors.

    Raises:
        BrokenFileError: the content is cut off, or is not what was written.
    """
    if not content.strip(b"\0 \t\r\n"):
        has_zeros = b"\0" in content
        kind = "full of zero bytes, as after a power failure" if has_zeros else "empty"
        raise BrokenFileError(f"{where}: {kind}")
    try:
        value = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BrokenFileError(
            f"{where}: not UTF-8 text (byte 0x{content[error.start]:02x} at {error.start})"
        ) from error
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
        if is_cut:
            raise BrokenFileError(f"{where}: cut off behind line {error.lineno}") from error
        raise BrokenFileError(
            f"{where}: not JSON ({error.msg} in line {error.lineno}, column {error.colno})"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; too deep
        raise BrokenFileError(f"{where}: not JSON ({error})") from error

    if not isinstance(value, dict):
        found = _NAMES.get(type(value), "a number")
        raise BrokenFileError(f"{where}: a JSON object was expected; found {found}")
    missing = [key for key in keys if key not in value]
    if missing:
        raise BrokenFileError(
            f"{where}: {', '.join(map(repr, missing))} is missing; found "
            f"{', '.join(map(repr, list(value)[:8])) or 'nothing'}"
        )
    return value


def read_records(url: str, forms: Sequence[Form] = ((),)) -> Records:
    """Return what can be read of a file of JSON lines; nothing where there is no file.

    Args:
        forms: a line that has none of these forms counts as broken.

    Raises:
        SourceError: the file cannot be read.
    """
    if not storage.exists(url):
        return Records()
    *complete, rest = storage.read_bytes(url).split(b"\n")

    lines: list[str] = []
    objects: list[dict[str, Any]] = []
    broken: list[int] = []
    for number, content in enumerate(complete, 1):
        try:
            entry = object_of(content, url)
        except BrokenFileError:
            broken.append(number)
            continue
        if not any(all(key in entry for key in form) for form in forms):
            broken.append(number)
            continue
        lines.append(content.decode("utf-8"))
        objects.append(entry)
    return Records(tuple(lines), tuple(objects), tuple(broken), is_cut_off=bool(rest))


def mend(url: str, forms: Sequence[Form] = ((),)) -> str:
    """Have a file of JSON lines hold its readable lines alone; the broken one is set aside.

    Args:
        forms: as for `read_records`.

    Returns:
        what was done, in a sentence; "" where nothing was to be done.

    Raises:
        SourceError: the file cannot be read.
        WriteError: it cannot be written.
    """
    records = read_records(url, forms)
    if not records.broken:
        return ""
    aside = copy_aside(url)
    storage.write_text(url, "".join(line + "\n" for line in records.lines))
    return (
        f"{url}: {records.broken_text} cannot be read; the other {len(records.lines):,} are kept. "
        f"The whole file is in {aside}"
    )


def mend_text(url: str) -> str:
    """Have a text file be UTF-8: other bytes are replaced, and the broken file is set aside.

    Returns:
        what was done, in a sentence; "" where nothing was to be done.

    Raises:
        SourceError: the file cannot be read.
        WriteError: it cannot be written.
    """
    if not storage.exists(url):
        return ""
    content = storage.read_bytes(url)
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        aside = copy_aside(url)
        storage.write_text(url, content.decode("utf-8", "replace"))
        return f"{url}: not UTF-8 text; the rest is kept. The whole file is in {aside}"
    return ""


def write_if_new(url: str, text: str) -> None:
    """Write a small file, unless it has this content already: so a restart needs no room for it.

    Raises:
        WriteError: it cannot be written; the error names it.
    """
    with contextlib.suppress(SourceError):  # it is not there, or cannot be read
        if storage.read_bytes(url, max_tries=1) == text.encode():
            return
    storage.write_text(url, text)


def copy_aside(url: str) -> str:
    """Copy a broken file to a name that no other file has; return its URL.

    Raises:
        WriteError: it cannot be written.
    """
    target = f"{url}.broken"
    number = 1
    while storage.exists(target):
        number += 1
        target = f"{url}.broken-{number}"
    storage.write_bytes(target, storage.read_bytes(url))
    return target
