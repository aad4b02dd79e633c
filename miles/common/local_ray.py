"""Starting Ray on this machine, or joining a cluster that is running.

A Ray that is started here belongs to this process alone and listens on 127.0.0.1 alone. Ray 2.60
binds a node's ports to every address of the machine, unless it takes the node to be no part of a
cluster, as it does on Windows and macOS. RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER overrides that, but Ray
reads it once, when it is imported. So its answer is set here, for as long as Ray starts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import ray
from ray._private import ray_constants

_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def start(num_cpus: int | None, object_store_bytes: int) -> None:
    """Start a Ray of this process's own; never join one that is running. `ray.shutdown()` ends it.

    Args:
        num_cpus: that tasks and actors may reserve; None: all of the machine.
        object_store_bytes: of shared memory.
    """
    with _bound_to_loopback(), _deaf_to_hang_ups():
        ray.init(
            address="local",
            num_cpus=num_cpus,
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )


@contextlib.contextmanager
def running(num_cpus: int | None, object_store_bytes: int) -> Iterator[None]:
    """Start a Ray as `start` does, which ends with the context."""
    start(num_cpus, object_store_bytes)
    try:
        yield
    finally:
        ray.shutdown()


def connect(num_cpus: int | None, object_store_bytes: int, address: str | None = None) -> bool:
    """Use the Ray that this process has, join the one that is named, or start one.

    Args:
        num_cpus: of one that is started, as in `start`.
        object_store_bytes: of one that is started, as in `start`.
        address: of the Ray to join; None: that in RAY_ADDRESS, where a submitted job finds its
            cluster.

    Returns:
        whether this call connected the process, so that the caller has to end it by
        `ray.shutdown()`.
    """
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    else:
        start(num_cpus, object_store_bytes)
    return True


@contextlib.contextmanager
def _deaf_to_hang_ups() -> Iterator[None]:
    """Have the processes that are started in the context ignore SIGHUP.

    A terminal that closes sends it to all of them, and the driver has yet to save. Ray 2.60 has
    them ignore Ctrl-C (SIGINT) in the same way.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextlib.contextmanager
def _bound_to_loopback() -> Iterator[None]:
    """Have a Ray that is started in the context bind to 127.0.0.1."""
    variable = os.environ.get(_VARIABLE)
    constant = ray_constants.ENABLE_RAY_CLUSTER
    os.environ[_VARIABLE] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant
        if variable is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = variable
