"""One small Ray for all integration tests, and one run that nothing happened to, for all that are compared with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from miles.common import local_ray
from tests.support.commands import Place, lines


@pytest.fixture(scope="session", autouse=True)
def ray_cluster() -> Iterator[None]:
    with local_ray.running(num_cpus=2, object_store_bytes=256 << 20):
        yield


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="session")
def unbroken(place: Place) -> Path:
    """The folder of a run that nothing happened to."""
    save = place.folder / "unbroken"
    with place.command(save, save_hf=save / "export") as command:
        command.wait(0)
    assert len(lines(save, "starts.jsonl")) == 2
    return save
