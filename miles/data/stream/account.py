"""The account of sources in words: what was read, dropped and not used, and what to do about it.

    ledger                                        lines for a card, a log, a page
    counts            5 unknown_role, 2 too_long  dropped           5 unknown_role, 2 too_long
                                                                    unknown_role: say what …
    keys_not_used     thought: 7                  keys not used     thought (7 rows)
    columns_not_used  id, source, …, 30 names     columns not used  id, source, … and 24 more
    left_out          [{names: [test.jsonl], …}]  files left out    1 of split test (test.jsonl)

Every part is short, whatever the rows are, and absent where there is nothing to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from miles.common.counts import counted
from miles.data.files.manifest import Manifest, ManifestSource
from miles.data.reasons import LEFT_OUT_BY_TRANSFORM, REASONS
from miles.data.types import REJECT_REASONS
from miles.data.unused_names import OTHERS

SHOWN_NAMES = 6
"""Keys and columns of a source that are shown."""
SHOWN_REMEDIES = 3
"""Reasons for which it is said what to do, the most frequent ones."""

SHOWN_FILES = 2
"""Files that are shown of each group that is left out."""

KEYS = "keys_not_used"
COLUMNS = "columns_not_used"
LEFT_OUT = "left_out"
"""Keys of a source's entry in `ledger.json`."""

Line = tuple[str, str]
"""A label and a text."""


def sentence(name: str, counts: Mapping[str, int]) -> str:
    """Return a source's counts as a sentence.

    chat: 300 rows read, 268 trained (5 truncated), 30 held out, 2 no_messages
    """
    truncated = f" ({counts['truncated']:,} truncated)" if counts.get("truncated") else ""
    parts = [f"{counted(counts['read'], 'row')} read", f"{counts['trained']:,} trained{truncated}"]
    if counts.get("held_out"):
        parts.append(f"{counts['held_out']:,} held out")
    parts += [f"{number:,} {reason}" for reason, number in reasons_of(counts).items()]
    return f"{name}: " + ", ".join(parts)


def reasons_of(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the rows that were dropped for each reason, the most frequent one first.

    Those that the user's function left out come last.
    """
    reasons = [reason for reason in REJECT_REASONS if counts.get(reason)]
    # What to do is said of the first: nothing is to be done about rows that were not wanted.
    reasons.sort(key=lambda reason: (reason == LEFT_OUT_BY_TRANSFORM, -counts[reason]))
    return {reason: counts[reason] for reason in reasons}


def remedies(counts: Mapping[str, int]) -> list[str]:
    """Return what to do about the most frequent reasons: `too_long: raise …`."""
    reasons = [reason for reason in reasons_of(counts) if reason != LEFT_OUT_BY_TRANSFORM]
    reasons = reasons[:SHOWN_REMEDIES]
    return [f"{reason}: {REASONS[reason].remedy}" for reason in reasons]


def dropped(counts: Mapping[str, int]) -> list[Line]:
    """Return the rows that were dropped by reason, and what to do; nothing where there are none."""
    numbers = ", ".join(f"{number:,} {reason}" for reason, number in reasons_of(counts).items())
    return [("dropped", numbers), *(("", text) for text in remedies(counts))] if numbers else []


def advice(counts: Mapping[str, int], first: str = "") -> str:
    """Say what to do about the most frequent reason. Begins with a blank; "" without a reason.

    Args:
        counts: rows by reason; other keys are passed over.
        first: the first row that was dropped for it, and why; "": it is known already.
    """
    reasons = list(reasons_of(counts))
    if not reasons:
        return ""

    reason = reasons[0]
    text = f" What to do: {REASONS[reason].remedy}."
    if first:
        reason += f" (first: {first})"
    if first or len(reasons) > 1:
        text = f" {'Most often' if len(reasons) > 1 else 'All'}: {reason}.{text}"
    return text


def not_used(source: ManifestSource, keys: Mapping[str, int]) -> dict[str, Any]:
    """Return what of a source's rows and files is not used; JSON-able, for `lines`.

    Args:
        source: of the manifest.
        keys: keys of messages that nothing reads -> rows that have them.
    """
    return {
        KEYS: _by_frequency(keys),
        COLUMNS: list(source.unused_columns),
        LEFT_OUT: [group.to_json() for group in source.left_out],
    }


def _by_frequency(keys: Mapping[str, int]) -> dict[str, int]:
    ordered = sorted(keys, key=lambda key: (key == OTHERS, -keys[key], key))
    return {key: keys[key] for key in ordered}


def of_manifest(manifest: Manifest) -> list[Line]:
    """Return the columns and files of all sources that are not used, as `lines` does."""
    return lines({source.name: not_used(source, {}) for source in manifest.sources})


def of_keys(keys: Mapping[str, Mapping[str, int]]) -> list[Line]:
    """Return the keys of all sources that nothing reads, as `lines` does.

    Args:
        keys: source -> key -> rows; of all sources of the data.
    """
    return lines({name: {KEYS: _by_frequency(counts)} for name, counts in keys.items()})


def sentences(ledger: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what was dropped and not used, as lines of a log.

    Args:
        ledger: as `Ledger.summary` returns it.
    """
    counts = total(entry["counts"] for entry in ledger.values())
    return as_text([*dropped(counts), *lines(ledger)])


def as_text(found: Iterable[Line], prefix: str = "") -> list[str]:
    """Return lines with their labels before them; what follows without one is indented."""
    return [f"{prefix}{label}: {text}" if label else f"    {text}" for label, text in found]


def lines(ledger: Mapping[str, Mapping[str, Any]]) -> list[Line]:
    """Return what is not used of the sources of a ledger: a line each, where there is something.

    Args:
        ledger: source -> what `not_used` gives; one of an older version has nothing of it.
    """
    found: list[Line] = []
    for label, key, described in (
        ("keys not used", KEYS, _keys),
        ("columns not used", COLUMNS, some),
        ("files left out", LEFT_OUT, _files),
    ):
        for name, entry in ledger.items():
            text = described(entry[key]) if entry.get(key) else ""
            if text:
                found.append((label, text if len(ledger) == 1 else f"{name}: {text}"))
    return found


def _keys(counts: Mapping[str, int]) -> str:
    """Return keys with the rows that have them: thought (7 rows), score (1 row)."""
    names = []
    for key, number in counts.items():
        names.append(f"{key} ({number:,} {'row' if number == 1 else 'rows'})")
    return some(names)


def _files(groups: Sequence[Mapping[str, Any]]) -> str:
    """Return the files that may hold rows and are not read: 2 of split test (a.jsonl, b.jsonl)."""
    texts = []
    for group in groups:
        if group["looks_like_rows"]:
            num_files = group["num_files"]
            names = [*group["names"][:SHOWN_FILES], *(["…"] if num_files > SHOWN_FILES else [])]
            texts.append(f"{num_files:,} {group['reason']} ({', '.join(names)})")
    return "; ".join(texts)


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
