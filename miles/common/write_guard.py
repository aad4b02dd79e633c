"""Folders that this process may write only while it holds them.

A run takes a lease on its folder (`lease.hold`). As long as it has it, each write of this process
below that folder first calls the lease's check, which raises if another run has taken the folder
over. The modules that write call `require`; a process that holds no lease has nothing to check.

    guarding("/runs/a", check)      require("/runs/a/metrics.jsonl")   calls check()
                                    require("/runs/b/metrics.jsonl")   does nothing
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class _Guard:
    place: str
    check: Callable[[], None]


_guards: list[_Guard] = []


@contextlib.contextmanager
def guarding(place: str, check: Callable[[], None]) -> Iterator[None]:
    """Have `require` call a check for a folder and all below it, until the context ends.

    Args:
        place: `storage.place_of` of the folder.
        check: raises where the folder must not be written any more.
    """
    guard = _Guard(place, check)
    _guards.append(guard)
    try:
        yield
    finally:
        _guards.remove(guard)


def is_active() -> bool:
    """Return whether this process guards any folder."""
    return bool(_guards)


def require(place: str) -> None:
    """Call the checks of the folders that a place lies in.

    Raises:
        MilesError: it must not be written any more.
    """
    for guard in tuple(_guards):
        if f"{place}/".startswith(f"{guard.place}/"):
            guard.check()
