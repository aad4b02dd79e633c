"""Random SIGKILLs of any process of a run: in the end it is the run that nothing happened to.

By hand with many seeds: pytest tests/integration/test_chaos.py --chaos-seeds 20 --seed 1
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.chaos import Ordeal, draw_kills, require_same_but_times
from tests.support.commands import Workspace
from tests.support.runs import require_same

pytestmark = pytest.mark.slow

SEED_OF_CI = 5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run one fixed seed, or as many as were asked for."""
    config = metafunc.config
    first, num_seeds = config.option.seed, config.option.chaos_seeds
    seeds = range(first, first + num_seeds) if num_seeds else [SEED_OF_CI]
    metafunc.parametrize("chaos_seed", seeds)


def test_killed_processes_change_nothing(
    workspace: Workspace, unbroken: Path, tmp_path: Path, chaos_seed: int
) -> None:
    kills = draw_kills(random.Random(chaos_seed))
    print(f"--chaos-seeds 1 --seed {chaos_seed}:", *kills, sep="\n  ")

    save = tmp_path / "run"
    ordeal = Ordeal(workspace, save, {"save_hf": save / "export"})
    ordeal.finish(kills)

    require_same(save, unbroken)
    require_same_but_times(save, unbroken)
