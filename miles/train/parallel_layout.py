"""The layout of the ranks: the tensor, pipeline and data-parallel place of each. No torch.

Tensor-parallel ranks are neighbours, then come data-parallel ranks, then pipeline stages. Eight
ranks with 2 tensor ranks and 2 pipeline stages are 2 replicas:

    rank              0  1  2  3  4  5  6  7
    tensor rank       0  1  0  1  0  1  0  1
    data rank         0  0  1  1  0  0  1  1
    pipeline stage    0  0  0  0  1  1  1  1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from miles.errors import ConfigError

if TYPE_CHECKING:
    from miles.architecture.config import ModelShape  # it opens files: fsspec

_TENSOR = "--tensor-model-parallel-size"
_PIPELINE = "--pipeline-model-parallel-size"
_EXPERT = "--expert-model-parallel-size"
_EXPERT_TENSOR = "--expert-tensor-parallel-size"
_WORLD = "--actor-num-nodes x --actor-num-gpus-per-node"


@dataclass(frozen=True)
class Layout:
    """The division of a run's ranks into kinds of parallelism."""

    world_size: int
    """ranks in all"""
    tensor: int = 1
    """tensor-parallel size"""
    pipeline: int = 1
    """pipeline stages"""
    sequence_parallel: bool = False
    """norms on a part of the tokens of each tensor-parallel rank"""
    expert: int = 1
    """ranks of one pipeline stage over which the experts of a layer are spread"""
    expert_tensor: int = 1
    """tensor-parallel size of each expert"""

    def __post_init__(self) -> None:
        sizes = {
            _TENSOR: self.tensor,
            _PIPELINE: self.pipeline,
            _EXPERT: self.expert,
            _EXPERT_TENSOR: self.expert_tensor,
            _WORLD: self.world_size,
        }
        for flag, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{flag} must be positive, not {size}")

        if self.world_size % (self.tensor * self.pipeline):
            raise ConfigError(
                f"{self.world_size} ranks ({_WORLD}) cannot be divided into replicas of "
                f"{_TENSOR} {self.tensor} x {_PIPELINE} {self.pipeline}"
            )
        if self.world_size % (self.expert * self.expert_tensor * self.pipeline):
            raise ConfigError(
                f"{self.world_size} ranks cannot be divided into {_EXPERT} {self.expert} x "
                f"{_EXPERT_TENSOR} {self.expert_tensor} x {_PIPELINE} {self.pipeline}"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ConfigError(
                f"--sequence-parallel spreads tokens over tensor-parallel ranks: give {_TENSOR} "
                "above 1, or leave it out"
            )

    def require_fits(self, shape: ModelShape) -> None:
        """Refuse a layout that cannot divide a model evenly.

        Raises:
            ConfigError: names each size that cannot be divided, and by which flag's value.
        """
        problems = [*self._uneven_sizes(shape), *self._expert_problems(shape)]
        if problems:
            raise ConfigError("this layout does not fit the model: " + "; ".join(problems))

    def _uneven_sizes(self, shape: ModelShape) -> list[str]:
        """Return a sentence for each size of the model that its parallel size does not divide."""
        is_dense = shape.num_experts is None
        divided = (
            ("attention heads", shape.num_attention_heads, _TENSOR, self.tensor),
            ("key/value heads", shape.num_query_groups, _TENSOR, self.tensor),
            ("the MLP's width", shape.ffn_hidden_size if is_dense else 0, _TENSOR, self.tensor),
            ("an expert's width", shape.moe_ffn_hidden_size, _EXPERT_TENSOR, self.expert_tensor),
            ("experts", shape.num_experts or 0, _EXPERT, self.expert),
            ("layers", shape.num_layers, _PIPELINE, self.pipeline),
        )

        return [
            f"{name} ({size}) cannot be divided by {flag} {parts}"
            for name, size, flag, parts in divided
            if size % parts
        ]

    def _expert_problems(self, shape: ModelShape) -> list[str]:
        """Return a sentence for each rule on experts that the layout breaks."""
        problems = []
        if shape.num_experts is None:
            if self.expert > 1:
                problems.append(f"{shape.model_type} has no experts to spread: leave out {_EXPERT}")
            return problems

        if self.tensor > 1 and not self.sequence_parallel:
            problems.append(
                "experts beside tensor parallelism are trained with --sequence-parallel only: "
                "give it"
            )
        # megatron-core 0.16.1 would not add up the gradients of such experts over the tensor
        # ranks, each of which saw other tokens.
        if self.expert == 1 and self.expert_tensor != self.tensor:
            problems.append(
                f"experts that are not spread ({_EXPERT} 1) are split as the rest is: give "
                f"{_EXPERT_TENSOR} {self.tensor}, not {self.expert_tensor}"
            )
        return problems

    @property
    def data(self) -> int:
        """Return the data-parallel size: the number of model replicas."""
        return self.world_size // (self.tensor * self.pipeline)

    @property
    def expert_data(self) -> int:
        """Return the number of ranks that hold the same experts."""
        return self.world_size // (self.expert * self.expert_tensor * self.pipeline)

    def data_rank(self, rank: int) -> int:
        """Return the data-parallel rank: the replica whose data a rank reads."""
        return rank // self.tensor % self.data

    def node_data_ranks(self, rank: int, ranks_per_node: int) -> tuple[int, ...]:
        """Return the data-parallel ranks of all ranks on a rank's node, ascending."""
        first = rank - rank % ranks_per_node
        ranks = range(first, min(first + ranks_per_node, self.world_size))
        return tuple(sorted({self.data_rank(neighbour) for neighbour in ranks}))

    def stage(self, rank: int) -> int:
        """Return the pipeline stage of a rank."""
        return rank // (self.tensor * self.data)

    def is_last_stage(self, rank: int) -> bool:
        return self.stage(rank) == self.pipeline - 1
