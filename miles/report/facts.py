"""The facts of a run for its page: model, hardware, versions, layout, durations.

They are those of the newest start in `starts.jsonl`. A run of an older version has fewer of them.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from miles.report.columns import Columns

Fact = tuple[str, str]
"""A label and a text."""

_TIME_FORM = "%Y-%m-%d %H:%M:%SZ"
_LAYOUT = ("tensor", "pipeline", "data", "expert")
_GIB = 1 << 30


def model_facts(starts: Sequence[Mapping[str, Any]]) -> list[Fact]:
    """Return what the newest start says of the model."""
    model = starts[-1].get("model", {}) if starts else {}
    facts = []
    for key, value in model.items():
        facts.append((str(key).replace("_", " "), _number(value)))
    return facts


def hardware_facts(starts: Sequence[Mapping[str, Any]]) -> list[Fact]:
    """Return what the newest start says of its machines and its layout."""
    if not starts:
        return []
    newest = starts[-1]
    facts = [("ranks", _number(newest["world_size"]))]
    layout = [f"{name} {newest[name]}" for name in _LAYOUT if name in newest]
    if layout:
        facts.append(("layout", ", ".join(layout)))
    if "precision" in newest:
        facts.append(("precision", str(newest["precision"])))

    hardware = newest.get("hardware")
    if hardware is None:
        return facts
    facts.append(("GPU", str(hardware["gpu"] or "none: trained on the CPU")))
    if hardware.get("cpu"):
        facts.append(("CPU", str(hardware["cpu"])))
    facts.append(("CPUs of the driver's machine", _number(hardware["cpus"])))
    facts.append(("memory of it", f"{hardware['memory_bytes'] / _GIB:,.0f} GiB"))
    facts.append(("system", str(hardware["system"])))
    return facts


def version_facts(starts: Sequence[Mapping[str, Any]]) -> list[Fact]:
    """Return the versions of miles and of the libraries at the newest start."""
    if not starts:
        return []
    facts = [("miles", str(starts[-1]["miles"]))] if "miles" in starts[-1] else []
    return [*facts, *((str(name), str(v)) for name, v in starts[-1].get("versions", {}).items())]


def duration_facts(entries: Sequence[Mapping[str, Any]], columns: Columns) -> list[Fact]:
    """Return how long a run took, and what for.

    Args:
        entries: of starts.jsonl: starts and ends.
        columns: of the metrics.
    """
    facts = []
    times = [str(entry["time"]) for entry in entries if "time" in entry]
    if times:
        facts.append(("first start", times[0]))
    ends = [entry for entry in entries if "end" in entry]
    if ends and "end" in entries[-1]:
        facts.append(("last end", str(ends[-1]["time"])))
        elapsed = _parsed(times[-1]) - _parsed(times[0])
        facts.append(("from first start to last end", shown_seconds(elapsed.total_seconds())))

    for label, key in (
        ("steps", "perf/step_seconds"),
        ("of them, in the trainers", "perf/train_seconds"),
        ("of them, waiting for data", "data/wait_seconds"),
        ("evaluations", "eval/seconds"),
    ):
        if key in columns:
            facts.append((label, shown_seconds(float(np.nansum(columns[key])))))
    return facts


def shown_seconds(seconds: float) -> str:
    """Return a duration in words: 4.2 s, 3 min 20 s, 5 h 12 min, 2 d 3 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def _parsed(time: str) -> datetime.datetime:
    return datetime.datetime.strptime(time, _TIME_FORM)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
