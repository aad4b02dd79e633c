"""The places of the turns in many rows of one program: their spans, by arithmetic on lengths.

    parts      "<|im_start|>user\n"  {0}  "<|im_end|>\n<|im_start|>assistant\n"  {1}  "<|im_end|>\n"
    lengths of the derived parts, two rows:                       {0}: 4, 9       {1}: 1, 70
    the turn begins 28 characters after {0} has ended, and ends 10 after {1} has

Literal parts are the same in all rows, so a place is a constant, and the lengths of the derived
parts before it. The anchors at a turn's begin (generation prompt, empty think block) mostly lie in
one literal part, which decides for all rows; where a derived part goes on, each row is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from miles.data.template.anchors import Anchors
from miles.data.template.symbols import Compute, Part
from miles.data.types import Int64


class Place(NamedTuple):
    """A character of a program's output."""

    part: int
    character: int
    """in that part"""


class Turn(NamedTuple):
    """An assistant turn in a program's output."""

    begin: Place
    """of the header"""
    end: Place
    """after the terminator"""


class Spans(NamedTuple):
    """The spans of many rows (`render.Span`): each int64 [rows, turns], in characters."""

    starts: Int64
    answers: Int64
    ends: Int64


@dataclass(frozen=True)
class TurnPlaces:
    """The turns of a program under the run's anchors."""

    turns: tuple[Turn, ...]
    computes: tuple[Compute, ...]
    """of the derived parts"""
    _anchors: Anchors
    _begins: _Places
    _ends: _Places
    _prompt_lengths: tuple[int | None, ...]
    """[turns]: characters from the begin to the span's start; None: they differ between rows"""
    _think_lengths: tuple[int | None, ...]
    """[turns]: characters of the empty think block after the header; None: as above"""

    @classmethod
    def of(cls, parts: Sequence[Part], turns: Sequence[Turn], anchors: Anchors) -> TurnPlaces:
        """Return the places of the turns of a program with these parts."""
        after_begins = []
        for turn in turns:
            part = parts[turn.begin.part]
            assert isinstance(part, str)
            is_last = turn.begin.part + 1 == len(parts)
            after_begins.append(_Literal(part[turn.begin.character :], is_last))

        return cls(
            turns=tuple(turns),
            computes=tuple(part.compute for part in parts if not isinstance(part, str)),
            _anchors=anchors,
            _begins=_Places.of(parts, [turn.begin for turn in turns]),
            _ends=_Places.of(parts, [turn.end for turn in turns]),
            _prompt_lengths=tuple(_prompt_length(text, anchors) for text in after_begins),
            _think_lengths=tuple(_think_length(text, anchors) for text in after_begins),
        )

    def spans(self, texts: Sequence[str], lengths: Int64) -> Spans:
        """Return the spans of rows.

        Args:
            texts: of the rows.
            lengths: int64 [rows, derived parts], in characters.
        """
        before = np.zeros((len(texts), lengths.shape[1] + 1), np.int64)
        np.cumsum(lengths, axis=1, out=before[:, 1:])
        begins = self._begins.of_rows(before)
        prompt = self._anchors.generation_prompt
        num_header = len(self._anchors.turn_header)

        starts = begins.copy()
        answers = begins + num_header
        for turn, (prompt_length, think_length) in enumerate(
            zip(self._prompt_lengths, self._think_lengths, strict=True)
        ):
            turn_begins = begins[:, turn]
            if prompt_length is not None:
                starts[:, turn] += prompt_length
            else:
                starts[:, turn] += [
                    len(prompt) if text.startswith(prompt, begin) else num_header
                    for text, begin in zip(texts, turn_begins.tolist(), strict=True)
                ]
            if think_length is not None:
                answers[:, turn] += think_length
            else:
                answers[:, turn] += [
                    self._think_at(text, begin + num_header)
                    for text, begin in zip(texts, turn_begins.tolist(), strict=True)
                ]
        return Spans(starts, np.maximum(starts, answers), self._ends.of_rows(before))

    def _think_at(self, text: str, header_end: int) -> int:
        for think in self._anchors.empty_thinks:
            if text.startswith(think, header_end):
                return len(think)
        return 0


@dataclass(frozen=True, eq=False)
class _Places:
    """Places of a program, by what they are made of."""

    constants: Int64
    """int64 [places]: characters of literal parts before each"""
    num_derived: Int64
    """int64 [places]: how many derived parts are before each"""

    @classmethod
    def of(cls, parts: Sequence[Part], places: Sequence[Place]) -> _Places:
        """Return places in a program of these parts."""
        is_derived = [not isinstance(part, str) for part in parts]
        literal_lengths = [len(part) if isinstance(part, str) else 0 for part in parts]
        literal_starts = list(accumulate(literal_lengths, initial=0))
        derived_before = list(accumulate(is_derived, initial=0))
        constants = [literal_starts[place.part] + place.character for place in places]
        num_derived = [derived_before[place.part] for place in places]
        return cls(np.array(constants, np.int64), np.array(num_derived, np.int64))

    def of_rows(self, before: Int64) -> Int64:
        """Return the places in each row: int64 [rows, places].

        Args:
            before: int64 [rows, derived parts + 1]: characters of the derived parts before each.
        """
        places: Int64 = before[:, self.num_derived] + self.constants
        return places


class _Literal(NamedTuple):
    """The text of a literal part from a place on."""

    text: str
    is_last: bool
    """no part follows"""

    def begins_with(self, anchor: str, begin: int = 0) -> bool | None:
        """Return whether an anchor is in the text at a place; None: the next part decides."""
        if self.text.startswith(anchor, begin):
            return True
        is_cut = anchor.startswith(self.text[begin:]) and not self.is_last
        return None if is_cut else False


def _prompt_length(text: _Literal, anchors: Anchors) -> int | None:
    is_prompted = text.begins_with(anchors.generation_prompt)
    if is_prompted is None:
        return None
    return len(anchors.generation_prompt if is_prompted else anchors.turn_header)


def _think_length(text: _Literal, anchors: Anchors) -> int | None:
    for think in anchors.empty_thinks:
        has_think = text.begins_with(think, len(anchors.turn_header))
        if has_think is not False:
            return len(think) if has_think else None
    return 0
