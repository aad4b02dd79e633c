"""A process by a name that no other one has, on any machine and at any time.

    host       "node-7"
    machine    "node-7/791d6f94-…/pid:[4026531836]": one boot of one machine, one namespace of pids
    pid        4711
    start      "8723341": when it began, in ticks since the boot; a pid is given again, with another

A process of the same `machine` can be looked up. One of another machine cannot.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_UNKNOWN = ""


@dataclass(frozen=True)
class ProcessIdentity:
    """A process that can be told from all others."""

    host: str
    machine: str
    """empty where the system does not tell: then no process can be looked up"""
    pid: int
    start: str

    @classmethod
    def of_this(cls) -> ProcessIdentity:
        """Return the identity of the process that asks."""
        pid = os.getpid()
        facts = _facts_of(pid)
        host = socket.gethostname()
        return cls(host, _machine(host), pid, facts.start if facts else _UNKNOWN)

    def is_alive(self) -> bool | None:
        """Return whether the process is running; None: it is of another machine, or hidden."""
        here = _machine(socket.gethostname())
        if not here or self.machine != here:
            return None
        facts = _facts_of(self.pid)
        if facts is None:
            # /proc may be mounted so that the processes of other users do not show (hidepid).
            return None if _takes_signals(self.pid) else False
        return facts.start == self.start and not facts.has_ended


@dataclass(frozen=True)
class _Facts:
    """The facts about a process that the kernel tells."""

    start: str
    has_ended: bool
    """it was killed, and its parent has not asked for its exit status yet"""


def _facts_of(pid: int) -> _Facts | None:
    """Return the facts about a process of this machine; None: there is none with this pid."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # "4711 (a name (with brackets)) S 1 …": the state is field 3, the start field 22.
    words = line.rpartition(")")[2].split()
    return _Facts(start=words[19], has_ended=words[0] in ("Z", "X"))


def _takes_signals(pid: int) -> bool:
    """Return whether there is a process with this pid, whoever's it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def _machine(host: str) -> str:
    """Return the name of this boot of this machine and of its pids; empty where it is not told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return _UNKNOWN
    return f"{host}/{boot}/{namespace}"
