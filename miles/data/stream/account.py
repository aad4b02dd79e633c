"""The account of a source in words: what was read, dropped and not used, and what to do about it.

    ledger                                        lines for a card, a log, a page
    counts            5 unknown_role, 2 too_long  dropped           5 unknown_role, 2 too_long
                                                                    unknown_role: say what the role …
    keys_not_used     thought: 7                  keys not used     thought (7 rows)
    columns_not_used  id, source, …, 30 names     columns not used  id, source, …, and 24 more

Every part is short, whatever the rows are, and absent where there is nothing to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from miles.data.files.manifest import ManifestSource
from miles.data.reasons import REASONS
from miles.data.types import REJECT_REASONS
from miles.data.unused_names import OTHERS

SHOWN_NAMES = 6
"""Keys and columns of a source that are shown."""
SHOWN_REMEDIES = 3
"""Reasons for which it is said what to do, the most frequent ones."""

KEYS = "keys_not_used"
COLUMNS = "columns_not_used"

Line = tuple[str, str]
"""A label and a text."""


def sentence(name: str, counts: Mapping[str, int]) -> str:
    """Return a source's counts as a sentence.

    chat: 300 rows read, 268 trained (5 truncated), 30 held out, 2 no_messages
    """
    truncated = f" ({counts['truncated']} truncated)" if counts.get("truncated") else ""
    parts = [f"{counts['read']} rows read", f"{counts['trained']} trained{truncated}"]
    if counts.get("held_out"):
        parts.append(f"{counts['held_out']} held out")
    parts += [f"{number} {reason}" for reason, number in reasons_of(counts).items()]
    return f"{name}: " + ", ".join(parts)


def reasons_of(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the rows that were dropped for each reason, the most frequent one first."""
    reasons = [reason for reason in REJECT_REASONS if counts.get(reason)]
    reasons.sort(key=lambda reason: -counts[reason])
    return {reason: counts[reason] for reason in reasons}


def remedies(counts: Mapping[str, int]) -> list[str]:
    """Return what to do about the most frequent reasons: `too_long: raise …`."""
    reasons = list(reasons_of(counts))[:SHOWN_REMEDIES]
    return [f"{reason}: {REASONS[reason].remedy}" for reason in reasons]


def not_used(source: ManifestSource, keys: Mapping[str, int]) -> dict[str, Any]:
    """Return what of a source's rows is read and not used; JSON-able, for `lines`.

    Args:
        source: of the manifest.
        keys: keys of messages that nothing reads -> rows that have them.
    """
    by_frequency = sorted(keys, key=lambda key: (key == OTHERS, -keys[key], key))
    return {
        KEYS: {key: keys[key] for key in by_frequency},
        COLUMNS: list(source.unused_columns),
    }


def lines(ledger: Mapping[str, Mapping[str, Any]]) -> list[Line]:
    """Return what is not used of the sources of a ledger: a line each, where there is something.

    Args:
        ledger: source -> what `not_used` gives; one of an older version has nothing of it.
    """
    found: list[Line] = []
    for label, key, described in (
        ("keys not used", KEYS, _keys),
        ("columns not used", COLUMNS, _columns),
    ):
        by_source = {
            name: described(entry[key]) for name, entry in ledger.items() if entry.get(key)
        }
        for name, text in by_source.items():
            found.append((label, text if len(ledger) == 1 else f"{name}: {text}"))
    return found


def _keys(counts: Mapping[str, int]) -> str:
    """Return keys with the rows that have them: thought (7 rows), score (1 row)."""
    names = []
    for key, number in counts.items():
        names.append(f"{key} ({number:,} {'row' if number == 1 else 'rows'})")
    return some(names)


def _columns(names: Sequence[str]) -> str:
    return some(names)


def some(names: Sequence[str]) -> str:
    """Return the first names of many: `a, b, c and 27 more`."""
    shown = ", ".join(names[:SHOWN_NAMES])
    num_more = len(names) - SHOWN_NAMES
    return f"{shown} and {num_more} more" if num_more > 0 else shown


def total(counts_of_sources: Iterable[Mapping[str, int]]) -> Counter[str]:
    """Return the counts of all sources together."""
    counts = Counter[str]()
    for counts_of_source in counts_of_sources:
        counts.update(counts_of_source)
    return counts
