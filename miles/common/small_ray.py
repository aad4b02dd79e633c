"""A Ray without the processes that nobody asks here: they cost two CPU seconds at each start.

    log monitor        prints the workers' output in the driver (`log_to_driver=False`)
    monitor            the autoscaler's: a Ray on one machine has no other to start
    dashboard          without a page (`include_dashboard=False`), it reports usage to Ray's authors

`ray.init` (2.60) has no option for them. `RayParams` has one for the first two; the third is a
method of `Node`. Both are of Ray's private part: a release without them starts all processes.
The agents of the node stay: they make runtime environments, and gather the metrics of `Gauge`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import ray
from ray._private import parameter
from ray._private.node import Node

_VARIABLE = "MILES_SMALL_RAY"
"""Set for the processes of a small Ray, its workers among them."""
_own_addresses: set[str] = set()
"""The addresses of the small Ray that this process has started."""
_OFF = {"include_log_monitor": False, "no_monitor": True}


@contextlib.contextmanager
def small_ray() -> Iterator[None]:
    """Have a Ray that is started in the context do without some of its processes."""
    params = parameter.RayParams
    start_api_server = getattr(Node, "start_api_server", None)
    if all(name in params.__init__.__code__.co_varnames for name in _OFF):
        parameter.RayParams = functools.partial(params, **_OFF)
    if start_api_server is not None:
        Node.start_api_server = _start_nothing

    os.environ[_VARIABLE] = "1"
    try:
        yield
        _own_addresses.clear()
        if ray.is_initialized():
            _own_addresses.add(ray.get_runtime_context().gcs_address)

    finally:
        del os.environ[_VARIABLE]
        parameter.RayParams = params
        if start_api_server is not None:
            Node.start_api_server = start_api_server


def _start_nothing(node: Node, **options: Any) -> None:
    """Stand in for the method that starts the dashboard."""


def is_inside() -> bool:
    """Return whether this process has started the Ray that it is connected to, or works in one."""
    return _VARIABLE in os.environ or ray.get_runtime_context().gcs_address in _own_addresses
