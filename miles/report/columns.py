"""The metrics of a run by key, as arrays: what curves are drawn from.

    {"step": 0, "sft/loss": 2.0}                      step      0     1     2
    {"step": 1, "sft/loss": null}               ->    sft/loss  2.0   NaN   1.5
    {"step": 2, "sft/loss": 1.5, "eval/loss": 1}      eval/loss NaN   NaN   1.0

Lines are added one at a time, so that a run that goes on is not read again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from miles.data.types import Float64
from miles.report.run_data import Metrics

_SPARSE = ("eval/loss",)
"""Keys that few lines have, and of which a number that is not finite is told from none."""


class Columns:
    """The numbers of a run's steps, by key."""

    def __init__(self, lines: Iterable[Metrics] = ()) -> None:
        self._columns: dict[str, list[float]] = {}
        self._given: dict[str, list[float]] = {}
        self._arrays: dict[str, Float64] = {}
        self.skipped: list[tuple[int, str]] = []
        """steps that took no optimizer step, and why"""
        self.num_steps = 0
        for line in lines:
            self.add(line)

    def add(self, line: Metrics) -> None:
        """Add a line of metrics.jsonl. What is neither a number nor null is passed over."""
        for key, value in line.items():
            if isinstance(value, str):
                if key == "sft/skipped":
                    self.skipped.append((int(line["step"]), value))
                continue
            if key in _SPARSE:
                self._given.setdefault(key, []).append(_number(value))
            column = self._columns.setdefault(key, [])
            column.extend([math.nan] * (self.num_steps - len(column)))
            column.append(_number(value))
        self.num_steps += 1
        self._arrays.clear()

    @property
    def keys(self) -> list[str]:
        """Return the keys that have numbers, sorted."""
        return sorted(self._columns)

    def __contains__(self, key: str) -> bool:
        return key in self._columns

    def __getitem__(self, key: str) -> Float64:
        """Return the numbers of a key, float64 [steps]: NaN where a step has none."""
        if key not in self._arrays:
            numbers = self._columns.get(key, [])
            array = np.full(self.num_steps, np.nan)
            array[: len(numbers)] = numbers
            self._arrays[key] = array
        return self._arrays[key]

    def of_lines(self, key: str) -> list[float]:
        """Return the numbers of the lines that have a key: NaN where one is not finite."""
        return self._given.get(key, [])

    @property
    def seconds(self) -> Float64:
        """The time of training up to each step, with evaluations and without checkpoints."""
        steps = np.nan_to_num(self["perf/step_seconds"])
        return np.cumsum(steps + np.nan_to_num(self["eval/seconds"]))


def _number(value: object) -> float:
    """Return a number as it is drawn; null, and what is no number, is a gap."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.nan
    return number if math.isfinite(number) else math.nan
