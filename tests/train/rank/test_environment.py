"""The variables of a rank: Miles's for a GPU, unless the user has set them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from miles.common.secret import Secret
from miles.errors import ConfigError
from miles.train.config import ClusterConfig
from miles.train.rank.environment import find_nvlink, shows_nvlink, variables_to_set
from miles.train.types import RankEnvironment

DEFAULTS = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "NCCL_NVLS_ENABLE": "1",
}


def environment(*, has_gpu: bool = True, **driver: str) -> RankEnvironment:
    """Return the environment of ranks that also get TOKEN."""
    cluster = ClusterConfig(train_env_vars={"TOKEN": Secret("hunter2")})
    return RankEnvironment.of(cluster, {"HOME": "/root", **driver}, has_gpu=has_gpu)


def test_a_gpu_rank_gets_what_miles_sets() -> None:
    assert variables_to_set(environment(), {}, has_nvlink=True) == {"TOKEN": "hunter2", **DEFAULTS}
    without = variables_to_set(environment(), {}, has_nvlink=False)
    assert without["NCCL_NVLS_ENABLE"] == "0"
    unknown = variables_to_set(environment(), {}, has_nvlink=None)
    assert "NCCL_NVLS_ENABLE" not in unknown, "NCCL finds out"


def test_a_cpu_rank_gets_only_what_is_given() -> None:
    on_cpu = environment(has_gpu=False, NCCL_NVLS_ENABLE="1")
    assert variables_to_set(on_cpu, {}, has_nvlink=None) == {"TOKEN": "hunter2"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUDA_DEVICE_MAX_CONNECTIONS", "8"),
        ("NCCL_NVLS_ENABLE", "0"),
        ("PYTORCH_ALLOC_CONF", "max_split_size_mb:512"),
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512"),
    ],
)
def test_the_users_setting_wins(name: str, value: str) -> None:
    of_rank = variables_to_set(environment(), {name: value}, has_nvlink=True)
    assert name not in of_rank, "it stays as it is"
    of_driver = variables_to_set(environment(**{name: value}), {}, has_nvlink=True)
    assert of_driver[name] == value
    of_both = variables_to_set(environment(**{name: "9"}), {name: value}, has_nvlink=True)
    assert name not in of_both

    cluster = ClusterConfig(train_env_vars={name: Secret(value)})
    given = RankEnvironment.of(cluster, {name: "9"}, has_gpu=True)
    assert variables_to_set(given, {name: "9"}, has_nvlink=True)[name] == value

    if "ALLOC" in name:  # torch reads both names: one is enough
        assert len({*of_driver} & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}) == 1
        assert "PYTORCH_ALLOC_CONF" not in of_rank


NVLINK = """\
\tGPU0\tGPU1\tNIC0\tCPU Affinity
GPU0\t X \tNV18\tPXB\t0-47
GPU1\tNV18\t X \tSYS\t0-47
"""
PCIE = """\
\tGPU0\tGPU1\tCPU Affinity
GPU0\t X \tPHB\t0-15
GPU1\tPHB\t X \t0-15

Legend:
  NV#  = Connection traversing a bonded set of # NVLinks
"""


def test_nvlink_is_read_from_the_topology(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shows_nvlink(NVLINK)
    assert not shows_nvlink(PCIE)

    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_nvlink() is None, "there is no nvidia-smi"
    program = tmp_path / "nvidia-smi"
    for script, answer in (
        (f"printf '{NVLINK}'", True),
        (f"printf '{PCIE}'", False),
        ("exit 9", None),
    ):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        assert find_nvlink() is answer


IN_AN_ACTOR = """
import os, sys
from miles.train.rank.actor import TrainerActor
from miles.train.types import RankEnvironment
assert "torch" not in sys.modules
actor = TrainerActor(0, RankEnvironment(True, {"TOKEN": "hunter2"}))
assert "torch" not in sys.modules, "it reads its variables when it is imported"
actor.load_modules()
assert "megatron.core" in sys.modules
unused = {"wandb", "tensorboard", "ray.data", "pandas", "transformers"} & sys.modules.keys()
assert not unused, f"a rank does not need {unused}"
print({name: text for name, text in os.environ.items() if name in sys.argv})
"""


def test_variables_are_set_before_torch_is_imported() -> None:
    names = ["TOKEN", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF"]
    clean = {name: text for name, text in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run(
        [sys.executable, "-c", IN_AN_ACTOR, *names],
        env=clean,
        check=True,
        capture_output=True,
        text=True,
    )
    assert ast.literal_eval(done.stdout) == {
        "TOKEN": "hunter2",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }


def test_a_variable_has_a_name() -> None:
    with pytest.raises(ConfigError, match="--train-env-vars: 'A': the name of a variable is not"):
        ClusterConfig(train_env_vars={"A=hunter2": Secret("1")})
    assert "hunter2" not in repr(environment())
