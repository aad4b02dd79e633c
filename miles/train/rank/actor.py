"""A trainer rank as a Ray actor: `step.Trainer` fed by a `StepIterator`."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray

from miles.architecture.config import ModelShape
from miles.common import checkpoint_folder, storage
from miles.data.stream import eval_set
from miles.data.stream.feed import StepIterator
from miles.train.config import TrainConfig
from miles.train.model import process_groups
from miles.train.parallel_layout import Layout
from miles.train.rank import checkpoint_load
from miles.train.types import StepResult, TrainerSettings

if TYPE_CHECKING:
    import numpy as np

    from miles.train.rank.checkpoint_writer import Saver


class TrainerActor:
    """One rank. Methods are collective unless they say otherwise: call them on every rank."""

    def __init__(self, rank: int) -> None:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        self.rank = rank
        self.trainer: Any = None
        self.saver: Saver

    def listen(self) -> str:
        """Rank 0: where the others meet it, on the address of this node that Ray uses, and on no other."""
        host = ray.util.get_node_ip_address()
        self._listener = socket.create_server((host, 0))
        return f"tcp://{host}:{self._listener.getsockname()[1]}"

    def setup(
        self,
        address: str,
        layout: Layout,
        shape: ModelShape,
        config: TrainConfig,
        num_steps: int,
        num_sources: int,
        found: checkpoint_folder.Found,
        model_only: bool,
    ) -> str | None:
        """Joins the group, builds the model and loads a checkpoint into it. Another call starts anew.

        Returns:
            the GPU's name; None on a CPU.
        """
        from miles.train.model.device import gpu_name
        from miles.train.rank.checkpoint_writer import Saver
        from miles.train.rank.rank_process import be_deterministic, start_rank
        from miles.train.rank.trainer import Trainer

        if self.trainer is not None:
            self.trainer = None
            process_groups.shutdown()
        listener = self._listener if self.rank == 0 else None
        self.layout = layout
        if config.deterministic:
            be_deterministic()
        start_rank(
            layout, self.rank, address, config.seed, config.cluster.timeout_minutes, listener
        )
        settings = TrainerSettings(
            shape,
            layout,
            config.optimizer,
            num_steps,
            num_sources,
            bf16=config.bf16,
            recompute=config.recompute,
        )
        self.trainer = Trainer(settings, self.rank)
        checkpoint_load.load(self.trainer, found, model_only=model_only)
        self.saver = Saver(self.trainer)
        return gpu_name()

    def attach(self, feed_handle: Any, first_step: int, num_steps: int) -> None:
        """From here on `train_step` takes its data from this feed."""
        self.steps = StepIterator(
            feed_handle, self.rank, self.layout.data_rank(self.rank), first_step, num_steps
        )

    def train_step(self) -> StepResult:
        report, micro_batches = next(self.steps)
        return self.trainer.train_step(report, micro_batches)

    def evaluate(
        self, references: Sequence[Sequence[Any]], num_sources: int
    ) -> tuple[list[float], list[int]]:
        """Loss sums and token counts by source of an `EvalSet`, over all data ranks."""
        mine = [of_ranks[self.layout.data_rank(self.rank)] for of_ranks in references]
        sums = self.trainer.evaluate(eval_set.micro_batches(mine), num_sources)
        return sums.losses, sums.tokens

    def generate(
        self, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], max_tokens: int
    ) -> list[list[int]]:
        """The most likely continuations (`Trainer.generate`)."""
        return self.trainer.generate(prompts, stop_ids, max_tokens)

    def sees(self, url: str) -> tuple[str, bool]:
        """Not collective: this machine's name, and whether a file is there."""
        return socket.gethostname(), storage.exists(url)

    def begin_save(self, url: str, iteration: int, extra: dict[str, Any]) -> str:
        return self.saver.begin(url, iteration, extra)

    def save_stage(self) -> str:
        """Not collective."""
        return self.saver.stage()

    def seal_save(self) -> str:
        return self.saver.seal()

    def end_uploads(self) -> str:
        """Not collective."""
        return self.saver.end_uploads()

    def logits(self, input_ids: list[int]) -> np.ndarray:
        """Not collective: a single rank's model, without tensor or pipeline parallelism."""
        return self.trainer.logits(input_ids)
