"""The memory and CPU time of a Ray's processes while it runs, by role."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import defaultdict
from typing import Any

import psutil
import ray

LOOK_SECONDS = 0.5
"""The time between two looks at the processes and the object store."""
RESTING_LOOK_SECONDS = 0.1
"""The same for the object store where consumers rest between steps."""


class Watch:
    """Looks several times a second at the memory and CPU time of this driver's Ray.

    `peak_bytes` has the bytes of all objects under "object store" and "spilled", and under each
    role the own memory of its largest process, without libraries and the object store, which it
    shares.
    """

    def __init__(self, store_seconds: float) -> None:
        self._store_seconds = store_seconds
        self.peak_bytes: dict[str, int] = {}
        self._titles: dict[int, str] = {}
        self._own_bytes: dict[int, int] = defaultdict(int)
        # At each moment: process -> its CPU seconds up to then. This thread's do not count.
        self._cpu: list[tuple[float, dict[int, float]]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        self._thread.join()
        for pid, peak in self._own_bytes.items():
            role = self._role(pid)
            if role != "ray":
                self.peak_bytes[role] = max(self.peak_bytes.get(role, 0), peak)

    def cpu_seconds(self, since: float, until: float) -> dict[str, float]:
        """Return the CPU seconds of each role between two moments, or between the nearest looks."""
        spent: dict[str, float] = defaultdict(float)
        before = [cpu for at, cpu in self._cpu if at <= since][-1]
        after = next((cpu for at, cpu in self._cpu if at >= until), self._cpu[-1][1])
        for pid, seconds in after.items():
            spent[self._role(pid)] += seconds - before.get(pid, 0.0)
        return dict(spent)

    def _role(self, pid: int) -> str:
        title = self._titles[pid]
        if not title.startswith("ray::") or title.endswith("Agent"):
            return "driver" if pid == os.getpid() else "ray"
        return "feed" if "FeedActor" in title else "consumer" if "Consumer" in title else "loader"

    def _watch(self) -> None:
        next_look = 0.0
        while not self._end.wait(self._store_seconds):
            if time.monotonic() >= next_look:
                self._look_at_processes()
                next_look = time.monotonic() + LOOK_SECONDS
            store = _object_store()
            for name, used in (
                ("object store", store.object_store_bytes_used),
                ("spilled", store.spilled_bytes_total),
            ):
                self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), used)

    def _look_at_processes(self) -> None:
        driver = psutil.Process()
        cpu = dict(self._cpu[-1][1]) if self._cpu else {}
        for process in [driver, *driver.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess, IndexError):
                title = process.cmdline()[0]
                memory = process.memory_info()
                times = process.cpu_times()
                own = memory.rss - getattr(memory, "shared", 0)
                self._own_bytes[process.pid] = max(self._own_bytes[process.pid], own)
                cpu[process.pid] = times.user + times.system
                if process is driver:
                    cpu[process.pid] -= time.thread_time()
                if title != "ray::IDLE" or process.pid not in self._titles:
                    self._titles[process.pid] = title
        self._cpu.append((time.monotonic(), cpu))


def _object_store() -> Any:
    from ray._private.internal_api import node_stats

    (node,) = ray.nodes()
    return node_stats(
        node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False
    ).store_stats
