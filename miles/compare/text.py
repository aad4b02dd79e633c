"""A comparison as text of at most 80 columns: verdicts, settings, a table of losses, a chart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from miles.common.counts import counted
from miles.common.shown import shown
from miles.compare.comparison import Comparison, LossPoint, SettingDifference, spread
from miles.compare.runs import Run

NUM_COLUMNS = 80
_TABLE_ROWS = 12
_CHART_ROWS = 10
_CHART_COLUMNS = 66
_MARKS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_RUNS = len(_MARKS)


def lines_of(comparison: Comparison) -> Iterator[str]:
    """Yield the lines of a comparison."""
    for mark, run in zip(_MARKS, comparison.runs, strict=False):
        first = min(run.steps)
        yield f"{mark}  {run.folder}"
        yield f"   steps {first:,} to {run.last_step:,}{_end_of(run)}"

    yield ""
    yield "Data"
    for mark, verdict in zip(_MARKS[1:], comparison.data, strict=False):
        yield from _wrapped(f"  {mark} against A: ", verdict.sentence())
        if verdict.fingerprints is not None:
            own, other = verdict.fingerprints
            yield f"    step {verdict.first_difference:,}: A {own}, {mark} {other}"

    yield ""
    yield "Settings"
    yield from _settings(comparison.settings)

    yield ""
    yield from _losses(comparison)


def _end_of(run: Run) -> str:
    """Return the tokens and the loss of the last step, as far as they are known."""
    step = run.steps[run.last_step]
    tokens = "" if step.tokens_seen is None else f", {counted(step.tokens_seen, 'trained token')}"
    loss = "" if step.loss is None else f", loss {step.loss:.4f}"
    return tokens + loss


def _settings(differences: Sequence[SettingDifference] | None) -> Iterator[str]:
    if differences is None:
        yield "  cannot be told: a run has no config.json that can be read"
        return
    if not differences:
        yield "  the same, but for where the runs write"
        return
    for difference in differences:
        yield f"  {difference.name}"
        for mark, value in zip(_MARKS, difference.values, strict=False):
            yield f"    {mark}  {'-' if value is None else shown(value, NUM_COLUMNS - 8)}"


def _losses(comparison: Comparison) -> Iterator[str]:
    points = comparison.losses
    if not points:
        yield "Losses"
        yield "  cannot be compared: the runs have neither a step nor tokens in common"
        return
    at_tokens = comparison.axis == "tokens"
    yield "Losses at common tokens: each of the step that comes to them" if at_tokens else "Losses"

    num_runs = len(comparison.runs)
    yield _row(comparison.axis, [*_MARKS[:num_runs], *(f"{m} - A" for m in _MARKS[1:num_runs])])
    for point in spread(points, _TABLE_ROWS):
        first, *others = point.losses
        differences = [
            None if first is None or other is None else other - first for other in others
        ]
        words = [_loss(loss) for loss in point.losses]
        words += [_loss(difference, sign="+") for difference in differences]
        yield _row(f"{point.at:,}", words)
    yield from _chart(points, num_runs, comparison.axis)


def _loss(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"


def _row(head: str, words: Sequence[str]) -> str:
    width = max(6, min(10, (NUM_COLUMNS - 14) // max(len(words), 1)))
    return f"{head:>13}" + "".join(f"{word:>{width}}" for word in words)


def _chart(points: Sequence[LossPoint], num_runs: int, axis: str) -> Iterator[str]:
    """Yield the losses as letters over the steps; "*" where several lie on one another."""
    finite = [
        loss
        for point in points
        for loss in point.losses
        if loss is not None and math.isfinite(loss)
    ]
    if len(points) < 2 or not finite:
        return
    low, high = min(finite), max(finite)
    begin, end = points[0].at, points[-1].at
    grid = [[" "] * _CHART_COLUMNS for _ in range(_CHART_ROWS)]
    for point in points:
        column = round((point.at - begin) / (end - begin) * (_CHART_COLUMNS - 1))
        for mark, loss in zip(_MARKS[:num_runs], point.losses, strict=True):
            if loss is None or not math.isfinite(loss):
                continue
            share = (high - loss) / (high - low) if high > low else 0.5
            row = round(share * (_CHART_ROWS - 1))
            grid[row][column] = mark if grid[row][column] == " " else "*"

    yield ""
    for number, cells in enumerate(grid):
        label = {0: f"{high:.3f}", _CHART_ROWS - 1: f"{low:.3f}"}.get(number, "")
        yield f"{label:>9} |{''.join(cells)}".rstrip()
    yield f"{'':>9} +{'-' * _CHART_COLUMNS}"
    right = f"{axis} {end:,}"
    yield f"{'':>11}{begin:,}{right:>{_CHART_COLUMNS - len(f'{begin:,}')}}"
    yield f"{'':>11}* several runs at one place"


def _wrapped(head: str, text: str) -> Iterator[str]:
    """Yield a text in lines, the further ones indented."""
    line = head
    for word in text.split():
        if len(line) + len(word) > NUM_COLUMNS and line.strip():
            yield line.rstrip()
            line = "    "
        line += f"{word} "
    yield line.rstrip()
