"""A small Ray of this process's own, whose ports are all on 127.0.0.1.

Ray 2.60 binds a node's ports to every address of the machine, unless it takes the node to be no part of a cluster,
which it does on Windows and macOS, and where RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER says so. It asks once, when it is
imported; so here it is told for as long as it starts. A dashboard is not started.
"""

from __future__ import annotations

import os

import ray
from ray._private import ray_constants

_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def start(num_cpus: int | None, object_store_bytes: int) -> None:
    """Starts it; `ray.shutdown()` ends it. Never joins one that is running.

    Args:
        num_cpus: that tasks and actors may reserve; None: all of the machine.
        object_store_bytes: of shared memory.
    """
    variable, constant = os.environ.get(_VARIABLE), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[_VARIABLE] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant
        if variable is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = variable
