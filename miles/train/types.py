"""The records that pass between the driver and the ranks. They need no torch.

driver  -- TrainerSettings -->  rank    once, when the trainers are set up
driver  <-- StepResult --       rank    after each step
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from miles.architecture.config import ModelShape
from miles.train.config import KEEP_ALL, OptimizerSettings, RecomputeConfig
from miles.train.parallel_layout import Layout


@dataclass(frozen=True)
class TrainerSettings:
    """The settings that a rank builds its trainer from; equal on all ranks."""

    shape: ModelShape
    layout: Layout
    optimizer: OptimizerSettings
    num_steps: int
    """steps of the whole run, for the learning-rate schedule"""
    num_sources: int
    """sources of the training data"""
    bf16: bool
    """mixed precision; else float32 throughout"""
    recompute: RecomputeConfig = KEEP_ALL
    """activations that are computed again in the backward pass"""


class SkipReason(StrEnum):
    """The reasons for which a step takes no optimizer step."""

    NOTHING_TO_TRAIN = "nothing to train"
    """All rows of the step were dropped. It says nothing about the model."""
    LOSS_NOT_FINITE = "the loss is not finite"
    GRADIENT_NOT_FINITE = "the gradient is not finite"


@dataclass(frozen=True)
class Skip:
    """The reason for which a step took no optimizer step, and the rows behind it."""

    reason: SkipReason
    row_ids: tuple[int, ...] = ()
    """Rows whose loss is not finite. All rows of the step where only the gradient is not; none
    where there was nothing to train."""


@dataclass(frozen=True)
class StepResult:
    """The outcome of one step; equal on every rank of the last pipeline stage."""

    source_losses: tuple[float, ...]
    """loss summed over each source's trained tokens"""
    source_tokens: tuple[int, ...]
    """trained tokens of each source"""
    grad_norm: float
    """global norm of the gradient before it is clipped; NaN where the loss was not finite"""
    lr: float
    """learning rate that this step used"""
    seconds: float
    skip: Skip | None = None
    """None: the optimizer step was taken"""

    @property
    def num_tokens(self) -> int:
        """Return the number of trained tokens of the global batch."""
        return sum(self.source_tokens)

    @property
    def loss(self) -> float:
        """Return the mean over all trained tokens of the global batch; NaN where there are none."""
        if not self.num_tokens:
            return float("nan")
        return sum(self.source_losses) / self.num_tokens
