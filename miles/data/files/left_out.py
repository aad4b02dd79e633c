"""The content of a folder beside the rows that are read, for people to see.

2 of split test (test.jsonl, test-2.jsonl)
1 without a known suffix (README.md)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miles.common.shown import cut

_MOST_NAMES = 5
_NAME_CHARACTERS = 80


@dataclass(frozen=True)
class LeftOut:
    """Files of a source's folders that are not read, for one reason."""

    reason: str
    """how the sentence "3 files …" goes on: "of split test", "hidden" """
    num_files: int
    """a folder that is hidden counts once"""
    names: tuple[str, ...]
    """the first ones, as paths in the folder; a folder's ends with a slash"""
    looks_like_rows: bool
    """they may hold rows that somebody wants: of another split, or in another format"""

    @classmethod
    def of(cls, reason: str, names: Iterable[str], looks_like_rows: bool) -> LeftOut:
        """Return the entry of some files."""
        ordered = sorted(names)
        shown = tuple(cut(_on_one_line(name), _NAME_CHARACTERS) for name in ordered[:_MOST_NAMES])
        return cls(reason, len(ordered), shown, looks_like_rows)

    def __str__(self) -> str:
        names = [*self.names, "…"] if self.num_files > len(self.names) else self.names
        return f"{self.num_files:,} {self.reason} ({', '.join(names)})"

    def to_json(self) -> dict[str, Any]:
        """Return the entry for the manifest."""
        return {
            "reason": self.reason,
            "num_files": self.num_files,
            "names": list(self.names),
            "looks_like_rows": self.looks_like_rows,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LeftOut:
        """Read what `to_json` returned."""
        return cls(
            content["reason"],
            content["num_files"],
            tuple(content["names"]),
            content["looks_like_rows"],
        )


def _on_one_line(name: str) -> str:
    return name if name.isprintable() else repr(name)[1:-1]


def merged(groups: Sequence[LeftOut]) -> tuple[LeftOut, ...]:
    """Return one entry for each reason, those that look like rows first."""
    by_reason: dict[str, LeftOut] = {}
    for group in groups:
        if (known := by_reason.get(group.reason)) is not None:
            names = (*known.names, *group.names)[:_MOST_NAMES]
            num_files = known.num_files + group.num_files
            group = LeftOut(group.reason, num_files, names, group.looks_like_rows)
        by_reason[group.reason] = group
    return tuple(sorted(by_reason.values(), key=lambda group: not group.looks_like_rows))
