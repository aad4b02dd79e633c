"""One small Ray for all integration tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from miles import local_ray


@pytest.fixture(scope="session", autouse=True)
def ray_cluster() -> Iterator[None]:
    local_ray.start(num_cpus=2, object_store_bytes=256 << 20)
    yield
    ray.shutdown()
