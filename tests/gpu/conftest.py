"""Tests on a GPU: one process, which is the only rank; the numbers of a CPU from another process.

They are skipped where there is no GPU. `MILES_GPU_TESTS_ON_CPU=1` runs them on a CPU, where what
they compare is the same code: to test the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.support import one_rank
from tests.support.one_rank import Numbers
from tests.support.processes import PROJECT

HERE = Path(__file__).parent
CPU_SECONDS = 80


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    is_possible = torch.cuda.is_available() or os.environ.get("MILES_GPU_TESTS_ON_CPU") == "1"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")
            # As in the processes of ranks: Megatron and torch warn by way of our own code, too.
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            if not is_possible:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of every family."""
    folder = tmp_path_factory.mktemp("families")
    one_rank.write_families(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def cpu_process(families: Path) -> Iterator[Callable[[], dict[str, Numbers]]]:
    """The numbers of a CPU: a process computes them while the first tests run."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.support.one_rank", str(families)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=PROJECT,
        stderr=subprocess.PIPE,
        text=True,
    )

    def numbers() -> dict[str, Numbers]:
        _, errors = process.communicate(timeout=CPU_SECONDS)
        assert process.returncode == 0, errors[-2000:]
        found = json.loads((families / "numbers.json").read_text())
        return {name: Numbers(**values) for name, values in found.items()}

    yield numbers
    process.kill()
    process.communicate()


@pytest.fixture(scope="session")
def on_cpu(cpu_process: Callable[[], dict[str, Numbers]]) -> dict[str, Numbers]:
    """The numbers of every model of `one_rank.FAMILIES` on a CPU, in float32."""
    return cpu_process()


@pytest.fixture(scope="session", autouse=True)
def rank(cpu_process: object) -> Iterator[None]:
    """Make this process the only rank."""
    from miles.train.model import process_groups

    # cuBLAS reads it when it is first used, for the test of deterministic mode.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # As in a trainer's process.
    torch._dynamo.config.disable = True
    one_rank.start_alone()
    yield
    process_groups.shutdown()
