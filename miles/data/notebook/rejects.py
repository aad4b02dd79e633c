"""The rows that were dropped: a list of dicts that prints in a line, and as a table in a notebook.

ds.ledger       2 of 300 rows dropped: 1 unknown_role, 1 too_long
ds.ledger[0]    {"source": "chat", "file": "chat.jsonl", "row": 17, "reason": …, "detail": …}
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, overload

from miles.common.counts import counted
from miles.common.screen import printable
from miles.data.stream import account

SHOWN_ROWS = 20
"""Dropped rows that a notebook shows."""

_TABLE_CSS = (
    "table-layout:auto;border-collapse:collapse;font:13px/1.5 system-ui,sans-serif;margin:6px 0"
)
_WHOLE_CHARACTERS = 48
"""A place that is not longer has one line, even beside a long detail."""
_CELL_CSS = "text-align:left;vertical-align:top;padding:2px 16px 2px 0"


class Rejects(Sequence[dict[str, Any]]):
    """Every dropped row, `{source, file, row, reason, detail}`, in the order of the files.

    Args:
        num_rows: rows that were read.
        say: has a remedy speak of Python's arguments.
    """

    def __init__(
        self, rejects: Sequence[dict[str, Any]], num_rows: int, say: Callable[[str], str] = str
    ) -> None:
        self._rejects = list(rejects)
        self._num_rows = num_rows
        self._say = say

    def __call__(self) -> list[dict[str, Any]]:
        """Return the rows as a list: `ledger` was a method once."""
        return list(self._rejects)

    def __len__(self) -> int:
        return len(self._rejects)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        return self._rejects[index]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Rejects):
            return self._rejects == other._rejects
        return self._rejects == other

    __hash__ = None  # type: ignore[assignment]  # as a list

    @property
    def reasons(self) -> dict[str, int]:
        """Return the rows that were dropped for each reason, the most frequent one first."""
        return account.reasons_of(Counter(str(reject["reason"]) for reject in self._rejects))

    def __repr__(self) -> str:
        if not self._rejects:
            return f"no row of {self._num_rows:,} dropped"
        counts = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.items())
        return f"{len(self._rejects):,} of {counted(self._num_rows, 'row')} dropped: {counts}"

    def _repr_html_(self) -> str:
        """Return the counts, the remedies, and a table of the first rejects."""
        remedies = ""
        for remedy in account.remedies(self.reasons):
            remedies += f"<div>{html.escape(self._say(remedy))}</div>"

        rows = ""
        for reject in self._rejects[:SHOWN_ROWS]:
            file = str(reject["file"]).rsplit("/", 1)[-1]
            place = f"{reject['source']}, {file} row {reject['row']:,}"
            if len(place) <= _WHOLE_CHARACTERS:
                place = place.replace(" ", "\N{NO-BREAK SPACE}")
            for cell in (reject["reason"], place, self._say(str(reject["detail"]))):
                rows += f'<td style="{_CELL_CSS}">{html.escape(printable(str(cell)))}</td>'
            rows = f"{rows}</tr><tr>"

        num_more = len(self._rejects) - SHOWN_ROWS
        more = f'<div style="opacity:.65">and {num_more:,} more</div>' if num_more > 0 else ""
        return (
            f'<div style="font:13px/1.5 system-ui,sans-serif"><b>{html.escape(repr(self))}</b>'
            f'<div style="opacity:.75">{remedies}</div>'
            f'<table style="{_TABLE_CSS}"><tr>{rows}</tr></table>{more}</div>'
        )
