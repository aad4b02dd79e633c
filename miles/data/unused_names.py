"""Names of what nothing reads, keys of messages and columns, kept few and short.

    thought, score, {a text of 300 characters}   ->   thought, score, {its first 40 characters}…
    more than 100 different names                ->   the first 100, then (others)

A row can have any number of keys, of any length. What is kept of them goes into cursors, ledgers
and onto screens.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_NAMES = 100
"""Names that are kept of a source."""
MAX_CHARACTERS = 40
"""The limit of a name; a longer one is cut."""
OTHERS = "(others)"
"""Stands for all names beyond `MAX_NAMES`."""


def short_name(name: str) -> str:
    """Return a name as it is kept: in one line, cut where it is long, and fit for UTF-8."""
    name = name.replace("\n", "↵")
    if len(name) > MAX_CHARACTERS:
        name = f"{name[: MAX_CHARACTERS - 1]}…"
    return name.encode("utf-8", "replace").decode()


def add_count(counts: dict[str, int], name: str, number: int) -> None:
    """Add to the count of a name, or to that of `OTHERS` where there are too many names already."""
    if name not in counts and len(counts) >= MAX_NAMES:
        name = OTHERS
    counts[name] = counts.get(name, 0) + number


def count_row(counts: dict[str, int], names: Iterable[str]) -> None:
    """Count a row for each of its names, and at most once for `OTHERS`."""
    has_others = False
    for name in dict.fromkeys(map(short_name, names)):
        if name in counts or len(counts) < MAX_NAMES:
            counts[name] = counts.get(name, 0) + 1
        else:
            has_others = True
    if has_others:
        counts[OTHERS] = counts.get(OTHERS, 0) + 1


def few_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return names as they are kept, each once."""
    short = list(dict.fromkeys(map(short_name, names)))
    return (*short[:MAX_NAMES], OTHERS) if len(short) > MAX_NAMES else tuple(short)
