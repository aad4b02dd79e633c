"""The metrics of a run -> the data of the page's charts, as one JSON object.

    {"charts": [{"name": "loss", "title": …, "unit": "nats a token", "log": true,
                 "x": {"step": [0, 1, 1, …], "tokens": […], "time": […]},
                 "curves": [{"label": "training", "color": 0, "kind": "line", "values": […]}],
                 "bands": [{"from": {"step": 41, …}, "to": {…}, "text": "waited 3.1 s for …"}]}],
     "marks": [{"kind": "skip", "at": {"step": 17, …}, "text": "the loss is not finite"}],
     "num_steps": 100000}

The places of a chart's points on an axis are differences, which are short: the first place, then
how far each point is from the one before. Times are in tenths of a second. A chart whose keys no
step has is left out. A value that is not finite is null. The curves of a chart share their steps; a
long run is thinned (`thinning`), so that the page stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from miles.data.types import Float64
from miles.report.columns import Columns
from miles.report.stalls import Stall, find_stalls
from miles.report.thinning import kept_steps

MAX_MARKS = 200
"""The limit of each kind of mark; the last ones are shown."""
_DIGITS = 6
"""Significant digits of a value."""
_AXIS_SCALES = {"time": 10}
"""Axis -> its units in a second; the others count whole things."""

LINE = "line"
EVALUATION = "evaluation"
"""Few points: drawn as dots on a dashed line."""
STAIRS = "stairs"
"""Whole numbers: drawn as stairs, never smoothed."""
EXACT = "exact"
"""A line that is set and not measured: never smoothed."""


@dataclass(frozen=True)
class Curve:
    """A curve of a chart."""

    label: str
    values: Float64
    """float64 [steps]"""
    kind: str = LINE
    color: int = 0
    """place in the palette of the page"""


@dataclass(frozen=True)
class Chart:
    """A chart of the page, before it is thinned."""

    name: str
    title: str
    about: str
    """what the curves mean, in a sentence"""
    curves: Sequence[Curve]
    unit: str = ""
    is_share: bool = False
    """values are shares of 1, shown in percent"""
    can_be_log: bool = False
    is_wide: bool = False
    stalls: Sequence[Stall] = field(default=())


def page_data(columns: Columns, starts: Iterable[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Return what the charts of a page are drawn from; JSON-able.

    Args:
        columns: of the run.
        starts: of the run, each with `first_step`, `reason`.
    """
    axes = _Axes(columns)
    shown = []
    for make in _CHARTS:
        chart = make(columns)
        if chart is not None and chart.curves:
            shown.append(_to_json(chart, axes))
    marks = [*_start_marks(starts, axes), *_skip_marks(columns, axes)]
    return {"charts": shown, "marks": marks, "num_steps": columns.num_steps}


class _Axes:
    """The x axes of all charts, and the places of a step on them."""

    def __init__(self, columns: Columns) -> None:
        self.arrays = {"step": columns["step"]}
        if "sft/tokens_seen" in columns:
            self.arrays["tokens"] = columns["sft/tokens_seen"]
        if "perf/step_seconds" in columns:
            self.arrays["time"] = columns.seconds

    def at(self, place: int) -> dict[str, float]:
        """Return where a step is on each axis."""
        return {name: round(float(array[place]), 1) for name, array in self.arrays.items()}

    def of_step(self, step: int) -> dict[str, float] | None:
        """Return where the step of a number is, or the next one; None: it was not trained yet."""
        place = int(np.searchsorted(self.arrays["step"], step))
        return self.at(place) if place < len(self.arrays["step"]) else None


def _to_json(chart: Chart, axes: _Axes) -> dict[str, Any]:
    kept = kept_steps([curve.values for curve in chart.curves])
    x = {}
    for name, array in axes.arrays.items():
        x[name] = _differences(array[kept] * _AXIS_SCALES.get(name, 1))

    curves = []
    for curve in chart.curves:
        values = [_rounded(value) for value in curve.values[kept].tolist()]
        curves.append(
            {"label": curve.label, "color": curve.color, "kind": curve.kind, "values": values}
        )
    bands = []
    for stall in chart.stalls:
        text = f"waited {stall.wait_seconds:.1f} s: {stall.cause}"
        bands.append({"from": axes.at(stall.first), "to": axes.at(stall.last), "text": text})
    return {
        "name": chart.name,
        "title": chart.title,
        "about": chart.about,
        "unit": chart.unit,
        "share": chart.is_share,
        "log": chart.can_be_log,
        "wide": chart.is_wide,
        "x": x,
        "curves": curves,
        "bands": bands,
    }


def _differences(places: Float64) -> list[int]:
    """Return the first place on an axis, and how far each other one is from the one before.

    A step without a place, as of another version's line, has that of the step before.
    """
    known = np.maximum.accumulate(np.nan_to_num(places))
    return np.diff(np.rint(known).astype(np.int64), prepend=0).tolist()


def _rounded(value: float) -> float | int | None:
    if not np.isfinite(value):
        return None
    short = float(f"{value:.{_DIGITS}g}")
    return int(short) if short.is_integer() else short


def _start_marks(starts: Iterable[Mapping[str, Any]], axes: _Axes) -> list[dict[str, Any]]:
    """Return a mark for each start but the first one of the run."""
    marks = []
    for start in list(starts)[1:]:
        place = axes.of_step(start["first_step"])
        if place is not None:
            marks.append({"kind": "start", "at": place, "text": start["reason"]})
    return marks[-MAX_MARKS:]


def _skip_marks(columns: Columns, axes: _Axes) -> list[dict[str, Any]]:
    marks = []
    for step, reason in columns.skipped[-MAX_MARKS:]:
        place = axes.of_step(step)
        marks.append({"kind": "skip", "at": place, "text": f"step {step} skipped: {reason}"})
    return marks


def _curves(columns: Columns, keys: Mapping[str, str], kind: str = LINE) -> list[Curve]:
    """Return a curve for each key that a step has a number of.

    Args:
        keys: key of metrics.jsonl -> label of its curve.
    """
    curves = []
    for color, (key, label) in enumerate(keys.items()):
        if np.isfinite(columns[key]).any():
            curves.append(Curve(label, columns[key], kind, color))
    return curves


def _loss(columns: Columns) -> Chart | None:
    curves = [Curve("training", columns["sft/loss"])]
    if "eval/loss" in columns:
        curves.append(Curve("evaluation", columns["eval/loss"], EVALUATION, 1))
    about = "Mean cross-entropy of a trained token: of each step, and of the evaluation rows."
    if len(curves) == 1:
        about = "Mean cross-entropy of a trained token in each step."
    return Chart(
        "loss", "Loss", about, curves, unit="nats per token", can_be_log=True, is_wide=True
    )


def _loss_by_source(columns: Columns) -> Chart | None:
    sources = sorted({key.split("/", 2)[2] for key in columns.keys if _is_source_loss(key)})
    if len(sources) < 2:
        return None

    curves = []
    for color, source in enumerate(sources):
        for prefix, kind in (("sft/loss/", LINE), ("eval/loss/", EVALUATION)):
            if prefix + source in columns:
                label = f"{source}, evaluation" if kind == EVALUATION else source
                curves.append(Curve(label, columns[prefix + source], kind, color))

    return Chart(
        "loss-by-source",
        "Loss by source",
        "The same, over each source's own tokens. Evaluations are dashed.",
        curves,
        unit="nats per token",
        can_be_log=True,
    )


def _is_source_loss(key: str) -> bool:
    return key.startswith(("sft/loss/", "eval/loss/"))


def _learning_rate(columns: Columns) -> Chart | None:
    return Chart(
        "learning-rate",
        "Learning rate",
        "The rate that each step used, after warmup and decay.",
        _curves(columns, {"sft/lr": "learning rate"}, EXACT),
        can_be_log=True,
    )


def _gradient_norm(columns: Columns) -> Chart | None:
    return Chart(
        "gradient-norm",
        "Gradient norm",
        "Global norm of the gradient, before it is clipped.",
        _curves(columns, {"sft/grad_norm": "gradient norm"}),
        can_be_log=True,
    )


def _queue_depth(columns: Columns) -> Chart | None:
    key = "data/prefetch_queue_depth"
    if key not in columns:
        return None
    return Chart(
        "queue-depth",
        "Steps ready in the queue",
        "Steps that the loader had ready when one was needed. At 0 the trainers waited; longer "
        "waits are shaded.",
        [Curve("steps ready", columns[key], STAIRS)],
        unit="steps",
        stalls=find_stalls(columns),
    )


def _step_time(columns: Columns) -> Chart | None:
    return Chart(
        "step-time",
        "Time of a step",
        "Without evaluations and checkpoints.",
        _curves(
            columns,
            {
                "perf/step_seconds": "whole step",
                "perf/train_seconds": "training",
                "data/wait_seconds": "waiting for data",
            },
        ),
        unit="s",
        can_be_log=True,
    )


def _speed(columns: Columns) -> Chart | None:
    return Chart(
        "speed",
        "Tokens per second",
        "All tokens of the step, trained or not, over the time of the whole step.",
        _curves(columns, {"perf/tokens_per_second": "tokens per second"}),
        unit="tokens/s",
        can_be_log=True,
    )


def _mfu(columns: Columns) -> Chart | None:
    return Chart(
        "mfu",
        "Model FLOPs utilization (MFU)",
        "The model's operations as a share of the GPU's bfloat16 peak.",
        _curves(columns, {"perf/mfu": "MFU"}),
        is_share=True,
    )


def _flops(columns: Columns) -> Chart | None:
    """Return the speed in FLOP/s where the peak of the device is not known."""
    if "perf/mfu" in columns:
        return None
    return Chart(
        "flops",
        "Model operations per second",
        "The model's operations on each rank. The peak of this device is not known.",
        _curves(columns, {"perf/tflops_per_gpu": "TFLOP/s of each rank"}),
        unit="TFLOP/s",
        can_be_log=True,
    )


def _lengths(columns: Columns) -> Chart | None:
    if "data/num_samples" not in columns:
        return None
    num_samples = columns["data/num_samples"]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(num_samples > 0, columns["data/num_tokens"] / num_samples, np.nan)
    return Chart(
        "lengths",
        "Length of a sample",
        "Mean tokens of the samples of each step.",
        [Curve("mean length", mean)],
        unit="tokens",
        can_be_log=True,
    )


def _packing(columns: Columns) -> Chart | None:
    return Chart(
        "packing",
        "Packing fill",
        "Tokens as a share of the room in the step's micro-batches.",
        _curves(columns, {"data/pack_fill": "filled"}),
        is_share=True,
    )


def _balance(columns: Columns) -> Chart | None:
    return Chart(
        "balance",
        "Load of the fullest",
        "Tokens of the fullest rank, and of the fullest expert, over the mean: 1 is even.",
        _curves(columns, {"data/dp_imbalance": "ranks", "sft/moe_max_load": "experts"}),
        unit="ratio",
    )


_CHARTS: Sequence[Callable[[Columns], Chart | None]] = (
    _loss,
    _loss_by_source,
    _learning_rate,
    _gradient_norm,
    _queue_depth,
    _step_time,
    _speed,
    _mfu,
    _flops,
    _lengths,
    _packing,
    _balance,
)
