"""The texts of a step's rows between rendering and encoding, and the turns in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np

from miles.data.types import Bool, Int64


class Turns(NamedTuple):
    """Assistant turns of many rows."""

    rows: Int64
    """int64 [turns]: the row of each"""
    begins: Int64
    """int64 [turns]: where the trained text begins, in characters of the row's text"""
    terminators: Int64
    """int64 [turns]: where the terminator begins"""
    is_trained: Bool
    """bool [turns]"""

    def where(self, is_kept: Bool) -> Turns:
        """Return some of the turns."""
        return Turns(
            rows=self.rows[is_kept],
            begins=self.begins[is_kept],
            terminators=self.terminators[is_kept],
            is_trained=self.is_trained[is_kept],
        )


class StepTexts:
    """Collects the texts and turns of rows, in any order of the rows."""

    def __init__(self, num_rows: int) -> None:
        self._texts: list[str | None] = [None] * num_rows
        self._opens = np.zeros(num_rows, np.bool_)
        self._parts: list[Turns] = []
        # The turns of rows that came one by one.
        self._rows: list[int] = []
        self._points: list[int] = []
        self._is_trained: list[bool] = []

    def add_rows(
        self, rows: Sequence[int], texts: Sequence[str], turns: Turns, is_kept: Bool, opens: bool
    ) -> None:
        """Add rows with as many turns each.

        Args:
            turns: of all the rows, row by row.
            is_kept: bool [rows]; the other rows are not added.
            opens: whether the texts begin with an added token.
        """
        if not is_kept.all():
            turns = turns.where(np.repeat(is_kept, len(turns.rows) // len(rows)))
            rows, texts = list(compress(rows, is_kept)), list(compress(texts, is_kept))
        if len(rows) == len(self._texts):  # most tables
            self._texts = list(texts)
        else:
            for row, text in zip(rows, texts, strict=True):
                self._texts[row] = text
        self._opens[rows] = opens
        self._parts.append(turns)

    def add_row(
        self, row: int, text: str, points: Sequence[int], selected: Sequence[bool], opens: bool
    ) -> None:
        """Add one row; `points` as `mark_points` returns them, `selected` as `select_turns`."""
        self._texts[row] = text
        self._opens[row] = opens
        self._rows += [row] * len(selected)
        self._points += points
        self._is_trained += selected

    def missing_rows(self) -> list[int]:
        """Return the rows that have no text."""
        return [row for row, text in enumerate(self._texts) if text is None]

    def groups(self, num_characters: int) -> Iterator[Int64]:
        """Yield the rows whose texts begin with an added token, some at a time.

        Args:
            num_characters: of the texts of a group together, unless one is longer by itself.
        """
        rows = np.flatnonzero(self._opens)
        lengths = np.array([len(text) for text in self.of_rows(rows)], np.int64)
        ends = lengths.cumsum()
        first = 0
        while first < len(rows):
            begin = ends[first] - lengths[first]
            last = max(int(ends.searchsorted(begin + num_characters, side="right")), first + 1)
            yield rows[first:last]
            first = last

    def of_rows(self, rows: Int64) -> list[str]:
        """Return the texts of rows that have one."""
        return [self._texts[row] for row in rows.tolist()]  # type: ignore[misc]

    def turns_of(self, rows: Int64) -> Turns:
        """Return the turns of rows. In the result, rows have the numbers 0, 1, 2, …"""
        if self._rows:
            points = np.array(self._points, np.int64)
            is_trained = np.array(self._is_trained, np.bool_)
            by_one = Turns(np.array(self._rows, np.int64), points[::2], points[1::2], is_trained)
            self._parts.append(by_one)
            self._rows, self._points, self._is_trained = [], [], []
        if len(self._parts) > 1:
            self._parts = [Turns(*map(np.concatenate, zip(*self._parts, strict=True)))]

        turns = self._parts[0]
        numbers = np.full(len(self._texts), -1)
        numbers[rows] = np.arange(len(rows))
        turns = turns._replace(rows=numbers[turns.rows])
        return turns if len(rows) == len(self._texts) else turns.where(turns.rows >= 0)
