"""The name that was meant: "did you mean …?", for commands, flags, values, columns and files.

closest("trian", ["train", "prepare"])        "train"
did_you_mean("openhermse", ["openhermes"])    "; did you mean openhermes?"
near_path("/rows/chta.jsonl")                 "/rows/chat.jsonl", if that is there
meant_path("/rows/chta.jsonl")                "; did you mean /rows/chat.jsonl?"
"""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Iterable

_LIKENESS = 0.6
"""The likeness of two names, from 0 to 1 (`difflib`): "tool" and "tools" have 0.89."""
FLAG_LIKENESS = 0.7
"""The same of flags: all begin alike, and many end alike."""
_LONGEST = 60
"""Characters of a word that are compared: no name is as long."""
_MOST_FILES = 1000
"""Files of a folder whose names are compared."""


def closest(word: str, known: Iterable[str], likeness: float = _LIKENESS) -> str | None:
    """Return the known name that a mistyped one is like; None where it is like none."""
    by_spelling = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word[:_LONGEST].lower(), by_spelling, n=1, cutoff=likeness)
    return by_spelling[near[0]] if near else None


def did_you_mean(
    word: str, known: Iterable[str], otherwise: str = "", likeness: float = _LIKENESS
) -> str:
    """Return a hint to stand behind an error: "; did you mean …?".

    Args:
        otherwise: the hint where no name is like the word; empty: none.
    """
    near = closest(word, known, likeness)
    if near is not None:
        return f"; did you mean {near}?"
    return f"; {otherwise}" if otherwise else ""


def meant_path(path: str) -> str:
    """Return a hint to stand behind an error on a path that is missing; "" where none is like it."""
    near = near_path(path)
    return "" if near is None else f"; did you mean {near}?"


def near_path(path: str) -> str | None:
    """Return the local path that is there, and is like one that is not; None where none is.

    The first part of the path that is missing is looked for beside its neighbours.
    """
    if "://" in path or "\0" in path:
        return None
    folder = path.rstrip("/")
    missing: list[str] = []
    while folder and not os.path.lexists(folder):
        folder, _, name = folder.rpartition("/")
        missing.insert(0, name)
    if not missing:
        return None

    root = "/" if path.startswith("/") else ""
    try:
        with os.scandir(folder or root or ".") as entries:
            names = [entry.name for entry in itertools.islice(entries, _MOST_FILES)]
    except OSError:
        return None
    near = closest(missing[0], names)
    if near is None:
        return None
    whole = "/".join([*([folder] if folder or root else []), near, *missing[1:]])
    return whole if os.path.exists(whole) else None
