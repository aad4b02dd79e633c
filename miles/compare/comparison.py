"""Two or more runs, compared with the first of them.

same data    by the fingerprint of each step: the same rows, as the same tokens, in one step
settings     those with another value, by their flags
losses       at common steps; where the runs have taken different numbers of tokens to the same
             step, at common tokens
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, get_type_hints

from miles.common.counts import counted
from miles.common.flags import settings_of
from miles.compare.runs import CURSOR, Run
from miles.train.config import TrainConfig

NUM_POINTS = 66
"""Losses that are compared: columns of the chart."""
_PLACES = ("save", "output_dir", "save_hf", "wandb", "tensorboard", "logging")
"""Settings that say where a run writes: they differ between any two runs."""
_MISSING = object()
T = TypeVar("T")


@dataclass(frozen=True)
class DataVerdict:
    """The answer to whether a run saw the data of the first one."""

    run: str
    is_same: bool | None
    """over all common steps that have fingerprints; None: it cannot be told"""
    num_common: int
    """steps that both runs have"""
    num_compared: int
    """those of them of which both have a fingerprint"""
    same_until: int | None
    """number of the last step before the first difference; None: there is none, or nothing tells"""
    first_difference: int | None
    fingerprints: tuple[str, str] | None
    """of that step, of the first run and of this one"""
    num_different: int
    causes: tuple[str, ...]
    """names of what decides the data, and differs (`runs.CURSOR`)"""

    def sentence(self) -> str:
        """Return the verdict for a person."""
        if self.num_common == 0:
            return "cannot be told: the runs have no step in common"
        if self.is_same is None:
            return (
                f"cannot be told: of the {self.num_common:,} common steps, none has a fingerprint "
                "in both"
            )
        some = ""
        if self.num_compared < self.num_common:
            missing = self.num_common - self.num_compared
            some = f"; of {missing:,} other common steps it cannot be told"
        if self.is_same:
            return f"the same rows and tokens in all {self.num_compared:,} compared steps{some}"

        until = "from the first step on"
        if self.same_until is not None:
            until = f"the same up to step {self.same_until:,}, then"
        causes = f"; different: {', '.join(self.causes)}" if self.causes else ""
        return (
            f"{until} other data: {self.num_different:,} of {counted(self.num_compared, 'step')} differ, "
            f"the first is step {self.first_difference:,}{causes}{some}"
        )


@dataclass(frozen=True)
class SettingDifference:
    """A setting with several values."""

    name: str
    """of its flag, or dotted where it has none"""
    values: tuple[Any, ...]
    """[runs]; None where a run has no such setting, as an older one"""


@dataclass(frozen=True)
class LossPoint:
    """The losses at one step, or at one number of tokens."""

    at: int
    losses: tuple[float | None, ...]
    """[runs]; None: the run has no loss there"""


@dataclass(frozen=True)
class Comparison:
    """Runs beside one another."""

    runs: tuple[Run, ...]
    data: tuple[DataVerdict, ...]
    """of each run but the first"""
    settings: tuple[SettingDifference, ...] | None
    """None: it cannot be told, as a config.json is missing"""
    axis: str
    """of the losses: "step" or "tokens" """
    losses: tuple[LossPoint, ...]
    """at most `NUM_POINTS`, from the first common one to the last"""

    @property
    def is_comparable(self) -> bool:
        """Return whether the losses of all runs have a place in common."""
        return len(self.losses) > 0

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return {
            "runs": [
                {"folder": run.folder, "steps": len(run.steps), "last_step": run.last_step}
                for run in self.runs
            ],
            "data": [{**vars(verdict), "words": verdict.sentence()} for verdict in self.data],
            "settings": None
            if self.settings is None
            else [vars(difference) for difference in self.settings],
            "losses": {"axis": self.axis, "points": [vars(point) for point in self.losses]},
            "is_comparable": self.is_comparable,
        }


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare runs with the first of them."""
    axis, losses = common_losses(runs)
    return Comparison(
        tuple(runs),
        tuple(same_data(runs[0], run) for run in runs[1:]),
        setting_differences(runs),
        axis,
        losses,
    )


def same_data(first: Run, other: Run) -> DataVerdict:
    """Compare the fingerprints of the steps of two runs."""
    common = sorted(first.steps.keys() & other.steps.keys())
    num_compared = 0
    different = []
    same_until = None
    for number in common:
        pair = (first.steps[number].fingerprint, other.steps[number].fingerprint)
        if pair[0] is None or pair[1] is None:
            continue
        num_compared += 1
        if pair[0] != pair[1]:
            different.append((number, (pair[0], pair[1])))
        elif not different:
            same_until = number

    causes = [
        name.replace("_", " ")
        for name in CURSOR
        if name in first.cursor
        and name in other.cursor
        and first.cursor[name] != other.cursor[name]
    ]
    return DataVerdict(
        run=other.folder,
        is_same=not different if num_compared else None,
        num_common=len(common),
        num_compared=num_compared,
        same_until=same_until if different else None,
        first_difference=different[0][0] if different else None,
        fingerprints=different[0][1] if different else None,
        num_different=len(different),
        causes=tuple(causes) if different else (),
    )


# Settings


def setting_differences(runs: Sequence[Run]) -> tuple[SettingDifference, ...] | None:
    """Return the settings in which runs differ, but for where they write; None: one has none."""
    settings = [run.settings for run in runs]
    if any(flat is None for flat in settings):
        return None
    names = dict.fromkeys(name for flat in settings for name in flat or {})
    differences = []
    for name in names:
        values = [(flat or {}).get(name, _MISSING) for flat in settings]
        if name.split(".")[0] in _PLACES or all(value == values[0] for value in values):
            continue
        shown = tuple(None if value is _MISSING else value for value in values)
        differences.append(SettingDifference(_flag_of(name), shown))
    return tuple(differences)


def _flag_of(name: str) -> str:
    """Return the flag of a setting by its dotted name; the name itself where it has none."""
    return _flags().get(name, name)


@cache
def _flags() -> Mapping[str, str]:
    """Return the flags of all settings of a run, by their dotted names."""
    return dict(_flags_in(TrainConfig, ""))


def _flags_in(record: type, before: str) -> Iterator[tuple[str, str]]:
    for setting in settings_of(record):
        yield f"{before}{setting.field}", setting.flag.name
    hints = get_type_hints(record)
    for field in dataclasses.fields(record):
        inner = hints[field.name]
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from _flags_in(inner, f"{before}{field.name}.")


# Losses


def common_losses(runs: Sequence[Run]) -> tuple[str, tuple[LossPoint, ...]]:
    """Return the losses at common steps, or at common numbers of tokens, and which of the two."""
    common = set(runs[0].steps)
    for run in runs[1:]:
        common &= run.steps.keys()
    tokens = [[run.steps[number].tokens_seen for run in runs] for number in common]
    knows_tokens = all(_tokens_of(run) for run in runs)
    if knows_tokens and any(len(set(at_step)) > 1 for at_step in tokens):
        return "tokens", _at_tokens(runs)

    steps = spread(sorted(common))
    points = [LossPoint(at, tuple(run.steps[at].loss for run in runs)) for at in steps]
    return "step", tuple(points)


def _at_tokens(runs: Sequence[Run]) -> tuple[LossPoint, ...]:
    """Return each run's loss of the step that came to a number of tokens, at numbers of the first.

    The numbers reach from what all runs have to what all runs have: nothing is extrapolated.
    """
    lists = [_tokens_of(run) for run in runs]
    begin = max(own[0][0] for own in lists)
    end = min(own[-1][0] for own in lists)
    grid = spread([at for at, _ in lists[0] if begin <= at <= end])
    points = []
    for at in grid:
        losses = []
        for run, own in zip(runs, lists, strict=True):
            _, number = own[bisect.bisect_left(own, (at, -1))]
            losses.append(run.steps[number].loss)
        points.append(LossPoint(at, tuple(losses)))
    return tuple(points)


def _tokens_of(run: Run) -> list[tuple[int, int]]:
    """Return (tokens so far, step) of a run, ascending; none where it does not know them."""
    found = [(step.tokens_seen, number) for number, step in run.steps.items()]
    known = [(tokens, number) for tokens, number in found if tokens is not None]
    return sorted(known) if len(known) == len(found) else []


def spread(values: Sequence[T], most: int = NUM_POINTS) -> list[T]:
    """Return at most so many of the values, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    places = [round(number * (len(values) - 1) / (most - 1)) for number in range(most)]
    return [values[place] for place in places]
