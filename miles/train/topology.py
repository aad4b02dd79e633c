"""Where each rank stands: the layout of tensor, pipeline and data parallelism, and its process groups."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import torch

from miles.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """How many ranks there are and what each is for. Tensor ranks are neighbours, then data, then pipeline."""

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        if self.sequence_parallel:
            raise ConfigError(
                "--sequence-parallel is not supported yet: it needs micro-batches padded to a multiple of the tensor "
                "size; leave it out"
            )
        if self.world_size % (self.tensor * self.pipeline):
            raise ConfigError(
                f"{self.world_size} ranks (--actor-num-nodes x --actor-num-gpus-per-node) cannot be divided into "
                f"replicas of --tensor-model-parallel-size {self.tensor} x --pipeline-model-parallel-size "
                f"{self.pipeline}"
            )

    @property
    def data(self) -> int:
        """data-parallel size: the number of model replicas"""
        return self.world_size // (self.tensor * self.pipeline)

    def data_rank(self, rank: int) -> int:
        """Which replica's data a rank reads."""
        return rank // self.tensor % self.data

    def is_last_stage(self, rank: int) -> bool:
        return rank // (self.tensor * self.data) == self.pipeline - 1


def initialize(layout: Layout, rank: int, init_method: str, seed: int, timeout_minutes: float) -> None:
    """Joins the process groups and seeds Megatron's random states. On a CPU: gloo; on a GPU: NCCL.

    Args:
        init_method: `tcp://host:port` of rank 0.
        timeout_minutes: how long a collective may wait before the run fails.
    """
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=layout.world_size,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor, pipeline_model_parallel_size=layout.pipeline
    )
    assert parallel_state.get_data_parallel_rank() == layout.data_rank(rank)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Leaves the process groups, so that another layout can be set up in this process."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
