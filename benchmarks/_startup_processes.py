"""The processes of a command, with all that Ray starts: their CPU seconds, and their end.

Ray's processes leave the tree of the one that started them. So they are known by a variable of
their environment, which each inherits.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import psutil

VARIABLE = "MILES_STARTUP_RUN"
IDLE = "idle Ray workers"
"""The role of a worker that has nothing to do; one that had keeps its role."""

_TICKS = os.sysconf("SC_CLK_TCK")


class Processes:
    """Watches the processes whose environment has `VARIABLE` with a value."""

    def __init__(self, value: str) -> None:
        self._line = f"{VARIABLE}={value}".encode()
        self._is_ours: dict[int, bool] = {}
        self._roles: dict[int, str] = {}
        self._seconds: dict[int, float] = {}
        self._born = time.time()

    def look(self) -> None:
        """Read the CPU time of each. What has ended since the last look keeps that of then."""
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            pid = int(name)
            with contextlib.suppress(OSError):
                if self._has_variable(pid):
                    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    self._seconds[pid] = (int(words[11]) + int(words[12])) / _TICKS
                    role = _role(Path(f"/proc/{pid}/cmdline").read_bytes())
                    if role and (role != IDLE or pid not in self._roles):
                        self._roles[pid] = role

    def seconds(self) -> dict[str, float]:
        """Return the CPU seconds by the role of the processes."""
        sums: dict[str, float] = {}
        for pid, seconds in self._seconds.items():
            role = self._roles.get(pid, "other")
            sums[role] = sums.get(role, 0.0) + seconds
        return sums

    def count(self, role: str) -> int:
        """Return the number of processes of a role that were seen."""
        return list(self._roles.values()).count(role)

    def kill(self) -> None:
        """End all of them, and those that they have started meanwhile."""
        for _ in range(100):
            self._is_ours.clear()
            self.look()
            alive = [pid for pid, is_ours in self._is_ours.items() if is_ours and _runs(pid)]
            if not alive:
                return
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def _has_variable(self, pid: int) -> bool:
        known = self._is_ours.get(pid)
        if known:
            return True
        if known is None or _is_young(pid):  # before its exec, a process has its parent's
            content = Path(f"/proc/{pid}/environ").read_bytes()
            self._is_ours[pid] = self._line in content.split(b"\0")
        return self._is_ours[pid]


def _is_young(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return time.time() - psutil.Process(pid).create_time() < 1.0
    return False


def _runs(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


_ROLES = (
    (b"raylet/raylet", "Ray's own: raylet"),
    (b"gcs/gcs_server", "Ray's own: gcs_server"),
    (b"dashboard/dashboard", "Ray's own: dashboard"),
    (b"ray::DashboardAgent", "Ray's own: agents"),
    (b"ray::RuntimeEnvAgent", "Ray's own: agents"),
    (b"agent", "Ray's own: agents"),
    (b"monitor.py", "Ray's own: monitors"),
    (b"miles.cli", "driver"),
    (b"TrainerActor", "trainers"),
    (b"FeedActor", "feed"),
    (b"_warm_up", "loaders"),
    (b"MapBatches", "loaders"),
    (b"_StatsActor", "ray.data: statistics"),
    (b"AutoscalingCoordinator", "ray.data: autoscaling"),
    (b"ray::IDLE", IDLE),
    (b"ray::", "other Ray workers"),
    (b"default_worker", IDLE),
)
"""Words of a command line, and the role of the process."""


def _role(words: bytes) -> str | None:
    return next((role for word, role in _ROLES if word in words), None)
