"""The demo's run on CPUs, on one GPU and on several."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.demo import run


@pytest.mark.parametrize(("num_gpus", "num_trainers"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_the_demo_takes_one_or_two_trainers(
    num_gpus: int, num_trainers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = {"CPU": 16.0} | ({"GPU": float(num_gpus)} if num_gpus else {})
    monkeypatch.setattr("ray.cluster_resources", lambda: resources)
    assert run._num_trainers() == num_trainers

    config = run.demo_config(tmp_path, num_trainers)
    assert config.cluster.world_size == config.data.pack.dp_size == num_trainers
