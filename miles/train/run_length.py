"""The number of steps of a run: `--num-epoch` or `--num-rollout`, whichever ends first.

    rows for 21 steps an epoch     --num-epoch 3                    63 steps
                                   --num-rollout 40                 40 steps, over 2 epochs
                                   --num-epoch 3 --num-rollout 40   40 steps
                                   --num-epoch 1 --num-rollout 40   21 steps

Miles ignores --num-epoch beside --num-rollout; here the smaller one counts, and the run says which.
"""

from __future__ import annotations

from miles.train.config import TrainConfig


def run_steps(config: TrainConfig, num_data_steps: int) -> int:
    """Return the number of steps of a run.

    Args:
        num_data_steps: steps of all its epochs.
    """
    return min(num_data_steps, config.num_rollout or num_data_steps)


def run_length(config: TrainConfig, steps_per_epoch: int, num_data_steps: int) -> str:
    """Return in words what the number of steps follows from: "21 an epoch x 3"."""
    num_epoch = config.data.order.num_epoch
    num_rollout = config.num_rollout
    epochs = f"{steps_per_epoch:,} an epoch x {num_data_steps // steps_per_epoch}"
    if num_rollout is None:
        return epochs
    if num_epoch is None:
        return f"--num-rollout {num_rollout}, {num_rollout / steps_per_epoch:.2f} epochs"

    if num_rollout < num_data_steps:
        return f"--num-rollout {num_rollout} ends before --num-epoch {num_epoch}, {epochs}"
    return f"{epochs}: --num-epoch {num_epoch} ends before --num-rollout {num_rollout}"
