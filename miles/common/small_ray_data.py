"""`ray.data` without actors of its own, in a Ray that this run has started (`small_ray`).

Ray Data (2.60) starts two actors for all data sets of a cluster. Each takes a process, which
imports Ray Data. It has no option to go without them, so their makers are replaced in the process
that runs a data set:

    _StatsActor                    has what Ray's dashboard shows, which is not started
    _AutoscalingCoordinatorActor   divides a cluster's nodes among data sets: its object lives here

On a cluster that is joined both are started as ever, and so they are by a release whose makers have
other names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import ray

from miles.common import small_ray


@cache
def keep_actors_away() -> None:
    """Have Ray Data start no actors from this process while it is in a Ray of ours."""
    from ray.data._internal import stats
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as autoscaling

    _replace(stats, "get_or_create_stats_actor", _Nobody)
    _replace(
        autoscaling,
        "get_or_create_autoscaling_coordinator",
        lambda: _coordinator(autoscaling),
    )


def _replace(module: Any, name: str, ours: Callable[[], Any]) -> None:
    """Replace the maker of an actor, where there is one, for as long as the Ray is ours."""
    theirs = getattr(module, name, None)
    if theirs is not None:
        setattr(module, name, lambda: ours() if small_ray.is_inside() else theirs())


class _Nobody:
    """Looks like the handle of an actor; its methods do nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def remote(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing. Whoever asks `ray.get` for the result hears that there is none."""


class _Here:
    """Looks like the handle of an actor, whose object is in this process."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return _Method(getattr(self._target, name))


class _Method:
    def __init__(self, method: Any) -> None:
        self._method = method

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method, and return a reference to its result."""
        return ray.put(self._method(*args, **kwargs))


_coordinators: dict[str, _Here] = {}
"""The only one of this process, by the address of the Ray that it is connected to."""


def _coordinator(module: Any) -> _Here:
    address = ray.get_runtime_context().gcs_address
    if address not in _coordinators:
        _coordinators.clear()
        _coordinators[address] = _Here(module._AutoscalingCoordinatorActor())
    return _coordinators[address]
