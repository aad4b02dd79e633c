"""The common parts of a loader's tasks: the manifest, seldom collections, errors that travel.

driver   ray.put((manifest, plan))         ->  a reference, which the tasks get
loader   manifest_and_plan(reference)      ->  read from the object store once a process
loader   failure(error, "…failed")         ->  an exception that Ray can carry
driver   cause_of(error, "…failed")        ->  the error of ours inside it
"""

from __future__ import annotations

from functools import cache
from typing import Any

import ray

from miles.common import garbage, remote_errors
from miles.data.files.manifest import Manifest
from miles.data.order.plan import Plan
from miles.errors import MilesError

collect_rarely = cache(garbage.collect_rarely)
"""Done once a process."""

_fetched: dict[Any, tuple[Manifest, Plan]] = {}


def manifest_and_plan(reference: Any) -> tuple[Manifest, Plan]:
    """Return the manifest and plan of a stream, read from the object store once a process."""
    if reference not in _fetched:
        _fetched.clear()
        _fetched[reference] = ray.get(reference)
    return _fetched[reference]


class StageFailure(Exception):
    """The error of a stage, on its way from a loader's process through Ray.

    Ray Data (2.60) adds a paragraph on its own retries to the text of any exception that passes it,
    and Ray cannot carry every exception. This one has the error as an attribute.
    """

    error: MilesError


def failure(error: Exception, subject: str) -> StageFailure:
    """Return what a task raises for an error: it says what that means for the run.

    Args:
        subject: begins the message where the error is not ours.
    """
    made = StageFailure()
    made.error = remote_errors.judge(error).as_error(subject)
    return made


def cause_of(error: BaseException, subject: str) -> MilesError:
    """Return the error of ours inside what Ray made of it, or what another error means.

    A `LostError` for a process, node or object that is gone; a `RunError` for an exception.
    """
    for seen in (error, getattr(error, "cause", None)):
        if isinstance(seen, StageFailure):
            return seen.error
    return remote_errors.judge(error).as_error(subject)
