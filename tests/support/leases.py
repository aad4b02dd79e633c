"""Leases of other machines, and a clock that passes when it is asked to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from miles.common import storage
from miles.common.lease import LEASE, Clock, Holder
from miles.common.lease_file import LeaseFile, lease_file
from miles.common.process_identity import ProcessIdentity


class PassingClock(Clock):
    """A clock that stands, but for those who sleep.

    Args:
        meanwhile: is called with the seconds so far after each sleep.
    """

    def __init__(self, meanwhile: Callable[[float], None] = lambda seconds: None) -> None:
        self.seconds = 0.0
        self._meanwhile = meanwhile

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        self._meanwhile(self.seconds)


def elsewhere(renewals: int = 0) -> Holder:
    """Return a holder of another machine."""
    process = ProcessIdentity("node-7", "node-7/boot/pid:[1]", 4711, "99")
    here = Holder.of_this_process("miles train")
    return replace(here, process=process, num_renewals=renewals)


def file_of(folder: str) -> LeaseFile:
    return lease_file(storage.join(folder, LEASE))


def takes_over(folder: str, holder: Holder) -> None:
    """Do what another machine does to a lease that it holds for dead."""
    file = file_of(folder)
    copy = file.read()
    assert copy is not None
    assert file.take_over(copy, holder.encode())
