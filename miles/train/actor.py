"""A trainer rank as a Ray actor: `step.Trainer` fed by a `StepIterator`."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

import ray

from miles.architecture import ModelShape
from miles.data.feed import StepIterator
from miles.train import checkpoint
from miles.train.optimizer import OptimizerSettings
from miles.train.topology import Layout

if TYPE_CHECKING:
    import numpy as np

    from miles.train.step import StepResult


class TrainerActor:
    """One rank. Methods are collective unless they say otherwise: call them on every rank."""

    def __init__(self, layout: Layout, rank: int) -> None:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        self.layout, self.rank = layout, rank

    def address(self) -> str:
        """Rank 0: where the others meet it."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def setup(
        self,
        init_method: str,
        shape: ModelShape,
        settings: OptimizerSettings,
        num_steps: int,
        num_sources: int,
        bf16: bool,
        seed: int,
        timeout_minutes: float,
        found: checkpoint.Found,
        model_only: bool,
    ) -> None:
        """Joins the group, builds the model and loads a checkpoint into it."""
        from miles.train.step import Trainer, start_rank

        start_rank(self.layout, self.rank, init_method, seed, timeout_minutes)
        self.trainer = Trainer(shape, self.layout, self.rank, settings, num_steps, num_sources, bf16=bf16)
        checkpoint.load(self.trainer, found, model_only=model_only)

    def attach(self, feed_handle: Any, first_step: int, num_steps: int) -> None:
        """From here on `train_step` takes its data from this feed."""
        self.steps = StepIterator(feed_handle, self.rank, self.layout.data_rank(self.rank), first_step, num_steps)

    def train_step(self) -> StepResult:
        report, micro_batches = next(self.steps)
        return self.trainer.train_step(report, micro_batches)

    def save(self, url: str, iteration: int, extra: dict[str, Any]) -> str:
        return checkpoint.save(self.trainer, url, iteration, extra)

    def logits(self, input_ids: list[int]) -> np.ndarray:
        """Not collective: a single rank's model, without tensor or pipeline parallelism."""
        return self.trainer.logits(input_ids)
