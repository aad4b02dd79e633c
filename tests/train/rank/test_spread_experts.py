"""A checkpoint continues with its optimizer, whether its experts were spread over ranks or not.

It was written with the experts one after another, and continues with them in one product.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from miles.common import checkpoint_folder
from miles.train.compute_config import ComputeConfig
from miles.train.parallel_layout import Layout
from tests.support.ranks import SHAPE, batch, run_ranks, start, trainer_settings

EXPERTS = replace(
    SHAPE, model_type="qwen3_moe", num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=32
)
SPREAD = Layout(2, expert=2)
SPLIT = Layout(4, tensor=2, sequence_parallel=True, expert=2, expert_tensor=2)
"""Each expert over two tensor-parallel ranks."""
WHOLE = Layout(1)
NUM_STEPS = 5
SAVED_STEP = 3


def train(
    layout: Layout, rank: int, meeting: Path, load: str | None, save: str | None, has_prefix: bool
) -> list[tuple[float, float]]:
    """Return loss and gradient norm of the steps that are left; save after `SAVED_STEP`.

    Args:
        has_prefix: write the optimizer's keys as versions did that had a prefix for each part.
    """
    from miles.train.rank import checkpoint_load, checkpoint_writer
    from miles.train.rank.trainer import Trainer

    start(layout, rank, meeting)
    compute = ComputeConfig(grouped_experts=load is not None)
    trainer = Trainer(replace(trainer_settings(EXPERTS, layout), compute=compute), rank)
    first_step = 0
    if load is not None:
        found = checkpoint_folder.find(load)
        assert found is not None
        checkpoint_load.load(trainer, found, model_only=False)
        first_step = found.iteration

    numbers = []
    for step in range(first_step, NUM_STEPS):
        report, micro_batches = batch(step, layout)
        result = trainer.train_step(report, micro_batches[layout.data_rank(rank)])
        numbers.append((result.loss, result.grad_norm))
        if step + 1 == SAVED_STEP and save is not None:
            checkpoint_load.CONTENT_FORMAT["chained_optim_avoid_prefix"] = not has_prefix
            checkpoint_writer.save(trainer, save, SAVED_STEP, {"cursor": {}})
            checkpoint_load.CONTENT_FORMAT["chained_optim_avoid_prefix"] = True
    return numbers


@pytest.mark.parametrize("has_prefix", [False, True])
@pytest.mark.parametrize("saved_by", [SPREAD, WHOLE], ids=["spread", "whole"])
def test_either_layout_continues(tmp_path: Path, saved_by: Layout, has_prefix: bool) -> None:
    require_continued(tmp_path, saved_by, (SPREAD, WHOLE), has_prefix)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved_by", "continued_by"), [(SPLIT, WHOLE), (SPREAD, SPLIT)], ids=["from", "to"]
)
def test_split_experts_continue(tmp_path: Path, saved_by: Layout, continued_by: Layout) -> None:
    require_continued(tmp_path, saved_by, (continued_by,))


def require_continued(
    folder: Path, saved_by: Layout, continued_by: tuple[Layout, ...], has_prefix: bool = False
) -> None:
    """Assert that other layouts take the steps behind a checkpoint as the one that wrote it."""
    saved = str(folder / "saved")
    unbroken = run_ranks(train, saved_by, None, saved, has_prefix)[-1]
    for layout in continued_by:
        resumed = run_ranks(train, layout, saved, None, False)[-1]
        np.testing.assert_allclose(resumed, unbroken[SAVED_STEP:], rtol=2e-5)
