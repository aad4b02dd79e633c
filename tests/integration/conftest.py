"""One small Ray for all integration tests, and one unbroken run that others are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from miles.common import local_ray
from tests.support.commands import Workspace
from tests.support.runs import lines


@pytest.fixture(scope="session", autouse=True)
def ray_cluster() -> Iterator[None]:
    """A Ray of two CPUs, which the tests' own process is connected to."""
    with local_ray.running(num_cpus=2, object_store_bytes=256 << 20):
        yield


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The folder from which runs are started by command."""
    return Workspace(tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="session")
def unbroken(workspace: Workspace) -> Path:
    """The folder of a run to which nothing happened."""
    save = workspace.folder / "unbroken"
    with workspace.command(save, save_hf=save / "export") as command:
        command.wait(0)
    assert len(lines(save, "starts.jsonl")) == 2
    return save
