"""The stalls of a run: spans of steps at which the trainers waited for data, and what for.

    step         40   41   42   43   44   45   46
    queue depth   3    0    0    1    0    4    4
    waited              s    s         s            ->  steps 41 to 44, waited 3.1 s, for encode

Waits that are at most `JOINED_STEPS` apart are one stall. The cause is found as for a whole run
(`data.stream.bottleneck`), from the times of the span.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from miles.data.stream.bottleneck import RAY, TOLERATED_WAIT, TRAINER, Bottleneck
from miles.data.types import STAGES, Int64
from miles.report.columns import Columns

JOINED_STEPS = 5
"""Waits that are this many steps apart, or fewer, are one stall."""
MAX_STALLS = 200
"""The longest ones that are shown."""

_CAUSES = {
    "read": "reading the files",
    "normalize": "reading the rows' shapes",
    "encode": "encoding",
    "pack": "packing",
    RAY: "the loader stood idle (CPUs, network or object store)",
    TRAINER: "waits too short to matter",
}


@dataclass(frozen=True)
class Stall:
    """A span of steps at which the trainers waited."""

    first: int
    """place of its first step in the metrics"""
    last: int
    wait_seconds: float
    limiting: str
    """`RAY`, a stage of the loader, or `TRAINER`"""

    @property
    def cause(self) -> str:
        """Return what was waited for, in words."""
        return _CAUSES[self.limiting]


def find_stalls(columns: Columns) -> list[Stall]:
    """Return the longest stalls of a run in the order of the steps.

    The first step is none of them: it waits for the stream to start.
    """
    depth = columns["data/prefetch_queue_depth"]
    wait = columns["data/wait_seconds"]
    waited = (depth == 0) & (wait > TOLERATED_WAIT * columns["perf/step_seconds"])
    places = np.flatnonzero(waited).astype(np.int64)
    places = places[places > 0]
    if not len(places):
        return []

    gaps = np.flatnonzero(np.diff(places) > JOINED_STEPS) + 1
    stalls = [_stall(columns, span) for span in np.split(places, gaps)]
    stalls.sort(key=lambda stall: -stall.wait_seconds)
    return sorted(stalls[:MAX_STALLS], key=lambda stall: stall.first)


def bottleneck_of(columns: Columns, first: int, last: int) -> Bottleneck:
    """Return the timing of a span of steps together.

    Args:
        first: place of the first step in the metrics.
        last: of the last one.
    """
    span = slice(first, last + 1)
    return Bottleneck(
        num_steps=last + 1 - first,
        num_waited=int(np.sum(columns["data/prefetch_queue_depth"][span] == 0)),
        wait_seconds=float(np.nansum(columns["data/wait_seconds"][span])),
        total_seconds=float(np.nansum(columns["perf/step_seconds"][span])),
        stage_seconds={
            stage: float(np.nansum(columns[f"data/{stage}_seconds"][span])) for stage in STAGES
        },
    )


def _stall(columns: Columns, places: Int64) -> Stall:
    first = int(places[0])
    last = int(places[-1])
    bottleneck = bottleneck_of(columns, first, last)
    return Stall(first, last, bottleneck.wait_seconds, bottleneck.limiting)
