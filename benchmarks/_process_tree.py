"""The cost of a command with all processes that it starts: wall time, CPU time, peak memory."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_LOOK_SECONDS = 0.05
_MEMORY_LOOK_SECONDS = 0.5
"""Asking for memory costs the kernel a walk through all pages."""


@dataclass(frozen=True)
class Cost:
    """The costs of a command."""

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    """of all processes at a time; what some share counts once (PSS)"""


def cost_of(line: Sequence[str], environment: Mapping[str, str], folder: Path) -> Cost:
    """Run a command to its end, and watch its processes.

    Raises:
        subprocess.CalledProcessError: it failed; what it printed stands in `stderr`.
    """
    cpu: dict[int, float] = {}
    peak_bytes = 0
    next_look = 0.0
    with (folder / "printed.txt").open("w+") as printed:
        started = time.monotonic()
        process = subprocess.Popen(
            line, env=environment, cwd=folder, stdout=printed, stderr=subprocess.STDOUT
        )

        root = psutil.Process(process.pid)
        while process.poll() is None:
            tree = _tree(root)
            for member in tree:
                with contextlib.suppress(psutil.Error):
                    times = member.cpu_times()
                    cpu[member.pid] = times.user + times.system
            if time.monotonic() >= next_look:
                peak_bytes = max(peak_bytes, sum(map(_own_bytes, tree)))
                next_look = time.monotonic() + _MEMORY_LOOK_SECONDS
            time.sleep(_LOOK_SECONDS)

        wall_seconds = time.monotonic() - started
        if process.returncode:
            printed.seek(0)
            raise subprocess.CalledProcessError(process.returncode, line, stderr=printed.read())
    return Cost(wall_seconds, sum(cpu.values()), peak_bytes)


def _tree(root: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [root, *root.children(recursive=True)]
    return []


def _own_bytes(process: psutil.Process) -> int:
    """Return a process's memory, its share of what it has with others; 0 where it has ended."""
    with contextlib.suppress(psutil.Error):
        memory = process.memory_full_info()
        return int(getattr(memory, "pss", memory.rss))
    return 0
