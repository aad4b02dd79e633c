"""Fewer points of a long curve, with its lows and highs kept.

A run of 100,000 steps has more points than a screen has columns. The steps are cut into as many
buckets as the limit allows, and of each bucket the steps stay at which a curve is lowest or highest.
The limit is some times the columns of a screen, so that there is more to see where one zooms in.

    steps     0  1  2 | 3  4  5 | 6  7  8
    loss      9  7  8 | 6  9  5 | 5  4  4
    kept      0  1    |    4  5 | 6  7  8      the first and the last step of all stay as well

All curves of a chart keep the same steps, so that each of them has a value wherever one has.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miles.data.types import Float64, Int64

MIN_POINTS, MAX_POINTS = 4_000, 20_000
"""Steps of a chart that are kept at most: of one with many curves, and of one with few."""
_MAX_VALUES = 45_000
"""Values of a chart, over all its curves."""


def points_for(num_curves: int) -> int:
    """Return how many steps of a chart are kept at most, so that a page has a few megabytes."""
    return min(max(_MAX_VALUES // num_curves, MIN_POINTS), MAX_POINTS)


def kept_steps(curves: Sequence[Float64], max_points: int | None = None) -> Int64:
    """Return the places of the steps to keep, ascending.

    Args:
        curves: float64 [steps] each; NaN is a gap, and no low or high.
        max_points: that are returned at most, as long as each curve can have a bucket; None: as
            many as a page has room for.
    """
    if max_points is None:
        max_points = points_for(len(curves))
    num_steps = len(curves[0])
    if num_steps <= max_points:
        return np.arange(num_steps)

    # A curve with few values, such as that of the evaluations, stays whole.
    kept = [np.array([0, num_steps - 1])]
    dense = []
    for curve in curves:
        places = np.flatnonzero(np.isfinite(curve))
        if len(places) <= max_points // (4 * len(curves)):
            kept.append(places)
        else:
            dense.append(curve)

    num_left = max_points - sum(map(len, kept))
    num_buckets = max(num_left // (2 * max(len(dense), 1)), 1)
    edges = np.linspace(0, num_steps, num_buckets + 1).astype(np.int64)
    for curve in dense:
        kept.append(_extremes(np.where(np.isnan(curve), np.inf, curve), edges))
        kept.append(_extremes(np.where(np.isnan(curve), np.inf, -curve), edges))
    return np.unique(np.concatenate(kept)).astype(np.int64)


def _extremes(curve: Float64, edges: Int64) -> Int64:
    """Return the place of the lowest value of each bucket; none of a bucket without one.

    Args:
        curve: float64 [steps]; infinite where there is no value.
        edges: int64 [buckets + 1]: where each bucket begins, and the end.
    """
    lowest = np.minimum.reduceat(curve, edges[:-1])
    buckets = np.repeat(np.arange(len(lowest)), np.diff(edges))
    places = np.flatnonzero(np.isfinite(curve) & (curve == lowest[buckets]))

    # The first place of each bucket: a curve that stays the same has its lowest value everywhere.
    _, first = np.unique(buckets[places], return_index=True)
    return places[first].astype(np.int64)
