"""Curves over the steps of a run, as matplotlib figures and as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from miles.report.run_data import Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE: dict[str, Any] = {"linewidth": 1.2}
_EVALUATION: dict[str, Any] = {**_LINE, "linestyle": "--", "marker": "o", "markersize": 3.5}

# The palette of the page (page/report.css): told apart with any kind of colour vision.
_SOURCE_COLORS = ("#0072b2", "#c44e00", "#007d5c", "#a1387e", "#7a6200", "#2b8ca3", "#444c56")
_LOSS_COLOR, _EVALUATION_COLOR, _QUEUE_COLOR, _SPEED_COLOR, *_ = _SOURCE_COLORS


def loss_chart(metrics: Sequence[Metrics]) -> Figure:
    """Draw the loss of training and of evaluations."""
    figure = _new_figure(width=8, height=4.2)
    axes = figure.subplots()
    _draw_loss(axes, metrics)
    _finish(axes)
    axes.set_xlabel("step")
    return figure


def run_chart(metrics: Sequence[Metrics]) -> Figure:
    """Draw loss, loss by source, learning rate, gradient norm, queue depth, tokens per second."""
    figure = _new_figure(width=10, height=9.2)
    (loss, by_source), (rate, norm), (queue, speed) = figure.subplots(3, 2)

    _draw_loss(loss, metrics)
    _draw_loss_by_source(by_source, metrics)
    _draw_numbers(rate, metrics, "sft/lr")
    _draw_numbers(norm, metrics, "sft/grad_norm")
    _draw_queue_depth(queue, metrics)
    _draw_tokens_per_second(speed, metrics)

    for axes in (loss, by_source, rate, norm, queue, speed):
        _finish(axes)
    for axes in (queue, speed):
        axes.set_xlabel("step")
    return figure


def to_png(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def _new_figure(*, width: float, height: float) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # Padding in inches, so that a title keeps its distance from the panel above.
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1)
    return Figure(figsize=(width, height), layout=layout)


def _draw_loss(axes: Axes, metrics: Sequence[Metrics]) -> None:
    axes.plot(*_points(metrics, "sft/loss"), **_LINE, color=_LOSS_COLOR, label="sft/loss")
    if not any("eval/loss" in line for line in metrics):
        _set_title(axes, "sft/loss")
        return
    axes.plot(
        *_points(metrics, "eval/loss"), **_EVALUATION, color=_EVALUATION_COLOR, label="eval/loss"
    )
    _set_title(axes, "sft/loss and eval/loss")
    axes.legend(frameon=False, fontsize=8)


def _draw_loss_by_source(axes: Axes, metrics: Sequence[Metrics]) -> None:
    """Draw a curve for each source; its evaluations are dashed and have the same colour."""
    axes.set_prop_cycle(color=_SOURCE_COLORS)
    keys = sorted(set().union(*metrics))
    evaluation_keys = [key for key in keys if key.startswith("eval/loss/")]

    # The legend names a source once: with an entry for each curve it would cover the curves.
    curves: dict[str, Any] = {}
    for key in keys:
        if key.startswith("sft/loss/"):
            source = key.removeprefix("sft/loss/")
            (curves[source],) = axes.plot(*_points(metrics, key), **_LINE, label=key)
    for key in evaluation_keys:
        source = key.removeprefix("eval/loss/")
        color = curves[source].get_color() if source in curves else None
        (curve,) = axes.plot(*_points(metrics, key), **_EVALUATION, color=color, label=key)
        curves.setdefault(source, curve)

    _set_title(axes, "loss by source" + (" (dashed: eval/loss)" if evaluation_keys else ""))
    axes.legend(curves.values(), curves, fontsize=8, framealpha=0.7, edgecolor="none")


def _draw_numbers(axes: Axes, metrics: Sequence[Metrics], key: str) -> None:
    axes.plot(*_points(metrics, key), **_LINE, color=_LOSS_COLOR)
    _set_title(axes, key)


def _draw_queue_depth(axes: Axes, metrics: Sequence[Metrics]) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, depths = _points(metrics, "data/prefetch_queue_depth")
    axes.step(steps, depths, **_LINE, where="mid", color=_QUEUE_COLOR)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _set_title(axes, "data/prefetch_queue_depth")


def _draw_tokens_per_second(axes: Axes, metrics: Sequence[Metrics]) -> None:
    from matplotlib.ticker import StrMethodFormatter

    axes.plot(*_points(metrics, "perf/tokens_per_second"), **_LINE, color=_SPEED_COLOR)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _set_title(axes, "perf/tokens_per_second")


def _set_title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, fontweight="bold")


def _finish(axes: Axes) -> None:
    """Start the values at 0, and leave only a pale grid and the axes."""
    axes.set_ylim(0, None)
    axes.margins(x=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    axes.tick_params(labelsize=8, color="#9ca3af")
    axes.xaxis.label.set_fontsize(9)
    axes.grid(alpha=0.25)


def _points(metrics: Sequence[Metrics], key: str) -> tuple[list[int], list[float]]:
    """Return the steps that have a key, and its values: NaN, a gap, where one was not finite."""
    lines = [line for line in metrics if key in line]
    steps = [line["step"] for line in lines]
    values = [math.nan if line[key] is None else line[key] for line in lines]
    return steps, values
