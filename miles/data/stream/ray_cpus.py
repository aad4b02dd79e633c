"""The CPUs of the Ray that this process is connected to."""

from __future__ import annotations

import ray

from miles.common.counts import counted
from miles.data.config import DataConfig
from miles.errors import NoRoomError


def num_cpus() -> int:
    """Return the CPUs that Ray has, in whole ones."""
    return max(int(ray.cluster_resources().get("CPU", 1)), 1)


def require_loader_cpus(config: DataConfig) -> None:
    """Refuse a cluster too small for the loader: its tasks would wait for CPUs for ever.

    Raises:
        NoRoomError: Ray has fewer CPUs than `--loader-cpus`.
    """
    cpus = ray.cluster_resources().get("CPU", 0)
    if cpus < config.stream.loader_cpus:
        raise NoRoomError(
            f"Ray has {counted(cpus, 'CPU')}; --loader-cpus {config.stream.loader_cpus} needs as many or "
            "more: lower it, or give Ray more CPUs"
        )
