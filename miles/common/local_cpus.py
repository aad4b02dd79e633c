"""The CPUs of this machine that this process may use: by its affinity, and by its container's share."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup/cpu.max")


def local_cpus() -> int:
    """Return how many processes can run at a time: at least 1."""
    num_cpus = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # macOS has none
        num_cpus = len(os.sched_getaffinity(0))
    return max(1, min(num_cpus, _container_cpus()))


def _container_cpus() -> int:
    """Return what the container's quota allows, rounded up; a large number where there is none."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = map(int, _CGROUP.read_text(encoding="ascii").split())  # "max" is no number
        return math.ceil(quota / period)
    return 1 << 16
