"""The number of steps of a run, and the sentence on what it follows from."""

from __future__ import annotations

import numpy as np
import pytest

from miles.data.config import DataConfig, EncodeConfig, OrderConfig, SourceConfig
from miles.data.order.plan import Plan
from miles.train.config import TrainConfig
from miles.train.run_length import run_length, run_steps

ROWS = Plan(np.array([0, 652]), np.array([0, 1]), OrderConfig())


@pytest.mark.parametrize(
    ("num_epoch", "num_rollout", "num_steps", "text"),
    [
        (None, None, 21, "21 an epoch x 1"),
        (3, None, 63, "21 an epoch x 3"),
        (None, 10, 10, "--num-rollout 10, 0.48 epochs"),
        (None, 21, 21, "--num-rollout 21, 1.00 epochs"),
        (None, 40, 40, "--num-rollout 40, 1.90 epochs"),
        (3, 40, 40, "--num-rollout 40 ends before --num-epoch 3, 21 an epoch x 3"),
        (1, 40, 21, "21 an epoch x 1: --num-epoch 1 ends before --num-rollout 40"),
    ],
)
def test_the_smaller_of_epochs_and_steps_ends_the_run(
    num_epoch: int | None, num_rollout: int | None, num_steps: int, text: str
) -> None:
    order = OrderConfig(batch_size=32, num_epoch=num_epoch)
    data = DataConfig((SourceConfig("a", ("a.jsonl",)),), order, EncodeConfig("t"))
    config = TrainConfig("hf", "megatron", "save", data, num_rollout=num_rollout)
    plan = Plan(ROWS.group_starts, ROWS.source_groups, config.streamed_data.order)
    assert run_steps(config, plan.num_steps) == num_steps
    assert run_length(config, plan.steps_per_epoch, plan.num_steps) == text
