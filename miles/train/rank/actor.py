"""A trainer rank as a Ray actor: a `Trainer` fed by a `StepIterator`.

The driver imports this module to start the actors, so torch and Megatron are imported in the
methods, which run in the rank's process. `ray.data` is imported where there is an evaluation.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from miles.common import storage
from miles.data.stream.step_iterator import StepIterator
from miles.train.rank.environment import find_nvlink, variables_to_set
from miles.train.types import (
    EvalSums,
    ExportPart,
    RankEnvironment,
    RankSetup,
    SaveFailure,
    SaveStage,
    StepResult,
)

if TYPE_CHECKING:
    import numpy as np

    from miles.train.parallel_layout import Layout
    from miles.train.rank.checkpoint_writer import CheckpointWriter
    from miles.train.rank.trainer import Trainer


class TrainerActor:
    """One rank. Methods are collective unless they say otherwise: call them on every rank.

    Args:
        rank: number of this rank among all.
        environment: variables for this process.
    """

    def __init__(self, rank: int, environment: RankEnvironment) -> None:
        has_nvlink = find_nvlink() if environment.has_gpu else None
        os.environ.update(variables_to_set(environment, os.environ, has_nvlink=has_nvlink))
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        self.rank = rank
        self.trainer: Trainer | None = None
        self.checkpoint_writer: CheckpointWriter
        self.steps: StepIterator
        self.layout: Layout
        self._listener: socket.socket | None = None

    def load_modules(self) -> None:
        """Import torch and Megatron, ahead of `setup`. Not collective."""
        from miles.train.rank import checkpoint_load, checkpoint_writer, rank_process, trainer

        del checkpoint_load, checkpoint_writer, trainer
        rank_process.load_megatron()

    def listen(self) -> str:
        """Open the port at which the ranks meet, and return its address. Rank 0 only.

        It listens on the address of this node that Ray uses, and on no other.
        """
        host = ray.util.get_node_ip_address()
        self._listener = socket.create_server((host, 0))
        return f"tcp://{host}:{self._listener.getsockname()[1]}"

    def setup(self, address: str, setup: RankSetup) -> str | None:
        """Join the ranks, build the model and load the checkpoint. A second call begins anew.

        Args:
            address: returned by `listen` of rank 0.

        Returns:
            the GPU's name; None on a CPU.
        """
        from miles.train.model import device, process_groups
        from miles.train.rank import checkpoint_load, rank_process
        from miles.train.rank.checkpoint_writer import CheckpointWriter
        from miles.train.rank.trainer import Trainer

        if self.trainer is not None:
            self.trainer = None
            process_groups.shutdown()

        if setup.is_deterministic:
            rank_process.be_deterministic()
        self.layout = setup.settings.layout
        rank_process.start_rank(
            self.layout, self.rank, address, setup.seed, setup.timeout_minutes, self._listener
        )

        self.trainer = Trainer(setup.settings, self.rank)
        base = checkpoint_load.load_start(self.trainer, setup.start)
        self.checkpoint_writer = CheckpointWriter(self.trainer, base)
        return device.gpu_name()

    def attach_feed(
        self, feed_handle: Any, first_step: int, num_steps: int, ranks_per_node: int
    ) -> None:
        """Take the data of `train_step` from this feed from now on. Not collective."""
        self.steps = StepIterator(
            feed_handle,
            self.rank,
            self.layout.data_rank(self.rank),
            first_step,
            num_steps,
            self.layout.node_data_ranks(self.rank, ranks_per_node),
        )

    def train_step(self) -> StepResult:
        """Train on the next step of the feed."""
        report, micro_batches = next(self.steps)
        return self._ready_trainer().train_step(report, micro_batches)

    def evaluate(self, references: Sequence[Sequence[Any]], num_sources: int) -> EvalSums:
        """Return the loss sums and token counts of an evaluation set, over all data ranks.

        Args:
            references: `EvalSet.references`.
            num_sources: sources of the evaluation set.
        """
        from miles.data.stream import eval_set

        data_rank = self.layout.data_rank(self.rank)
        own_references = [chunk_references[data_rank] for chunk_references in references]
        micro_batches = eval_set.micro_batches(own_references)
        sums = self._ready_trainer().evaluate(micro_batches, num_sources)
        return EvalSums(sums.losses, sums.tokens)

    def generate(
        self, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], max_tokens: int
    ) -> list[list[int]]:
        """Return the most likely continuation of each prompt (`Trainer.generate`)."""
        return self._ready_trainer().generate(prompts, stop_ids, max_tokens)

    def sees_file(self, url: str) -> tuple[str, bool]:
        """Return this machine's name, and whether a file is there. Not collective."""
        return socket.gethostname(), storage.exists(url)

    def begin_save(self, url: str, iteration: int, extra: dict[str, Any]) -> SaveFailure | None:
        """Begin a checkpoint (`CheckpointWriter.begin`)."""
        return self.checkpoint_writer.begin(url, iteration, extra)

    def save_stage(self) -> SaveStage:
        """Return how far this rank is with the checkpoint. Not collective."""
        return self.checkpoint_writer.stage()

    def seal_save(self) -> SaveFailure | None:
        """Make a checkpoint of what all ranks have written (`CheckpointWriter.seal`)."""
        return self.checkpoint_writer.seal()

    def finish_upload(self) -> SaveFailure | None:
        """End this rank's upload (`CheckpointWriter.finish_upload`). Not collective."""
        return self.checkpoint_writer.finish_upload()

    def write_export(self, folder: str) -> ExportPart:
        """Write this rank's weights into the files of an export (`weight_boxes.write_weights`)."""
        from miles.train.rank import weight_boxes

        return weight_boxes.write_weights(self._ready_trainer(), Path(folder))

    def logits(self, input_ids: list[int]) -> np.ndarray:
        """Return the logits of one sequence. Without tensor or pipeline parallelism only."""
        return self._ready_trainer().logits(input_ids)

    def _ready_trainer(self) -> Trainer:
        assert self.trainer is not None, "setup comes first"
        return self.trainer
