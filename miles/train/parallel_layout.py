"""The layout of the ranks: which tensor, pipeline and data-parallel place each one has. Arithmetic without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from miles.errors import ConfigError

if TYPE_CHECKING:
    from miles.architecture.config import ModelShape  # it opens files: fsspec


@dataclass(frozen=True)
class Layout:
    """How many ranks there are and what each is for. Tensor ranks are neighbours, then data, then pipeline."""

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    expert: int = 1
    """a layer's experts are spread over so many ranks, those of one pipeline stage"""
    expert_tensor: int = 1
    """tensor-parallel size of each expert"""

    def __post_init__(self) -> None:
        for flag, size in (
            ("--tensor-model-parallel-size", self.tensor),
            ("--pipeline-model-parallel-size", self.pipeline),
            ("--expert-model-parallel-size", self.expert),
            ("--expert-tensor-parallel-size", self.expert_tensor),
            ("--actor-num-nodes x --actor-num-gpus-per-node", self.world_size),
        ):
            if size < 1:
                raise ConfigError(f"{flag} must be positive, not {size}")
        if self.world_size % (self.tensor * self.pipeline):
            raise ConfigError(
                f"{self.world_size} ranks (--actor-num-nodes x --actor-num-gpus-per-node) cannot be divided into "
                f"replicas of --tensor-model-parallel-size {self.tensor} x --pipeline-model-parallel-size "
                f"{self.pipeline}"
            )
        if self.world_size % (self.expert * self.expert_tensor * self.pipeline):
            raise ConfigError(
                f"{self.world_size} ranks cannot be divided into --expert-model-parallel-size {self.expert} x "
                f"--expert-tensor-parallel-size {self.expert_tensor} x --pipeline-model-parallel-size {self.pipeline}"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ConfigError(
                "--sequence-parallel spreads tokens over tensor-parallel ranks: give --tensor-model-parallel-size "
                "above 1, or leave it out"
            )

    def require_fits(self, shape: ModelShape) -> None:
        """Refuses a layout into which a model cannot be cut evenly.

        Raises:
            ConfigError: names each size that does not divide, and by what.
        """
        tensor, expert_tensor = "--tensor-model-parallel-size", "--expert-tensor-parallel-size"
        is_moe = shape.num_experts is not None
        wrong = [
            f"{what} ({size}) cannot be divided by {flag} {parts}"
            for what, size, flag, parts in (
                ("attention heads", shape.num_attention_heads, tensor, self.tensor),
                ("key/value heads", shape.num_query_groups, tensor, self.tensor),
                ("the vocabulary", shape.vocab_size, tensor, self.tensor),
                ("the MLP's width", 0 if is_moe else shape.ffn_hidden_size, tensor, self.tensor),
                ("an expert's width", shape.moe_ffn_hidden_size, expert_tensor, self.expert_tensor),
                ("experts", shape.num_experts or 0, "--expert-model-parallel-size", self.expert),
                ("layers", shape.num_layers, "--pipeline-model-parallel-size", self.pipeline),
            )
            if size % parts
        ]
        if not is_moe and self.expert > 1:
            wrong.append(
                f"{shape.model_type} has no experts to spread: leave out --expert-model-parallel-size"
            )
        if is_moe and self.tensor > 1 and not self.sequence_parallel:
            wrong.append(
                "experts beside tensor parallelism are trained with --sequence-parallel only: give it"
            )
        if is_moe and self.expert == 1 and self.expert_tensor != self.tensor:
            # megatron-core 0.16.1 then sums no gradient of theirs over the tensor ranks, each of which saw other tokens
            wrong.append(
                f"experts that are not spread (--expert-model-parallel-size 1) are split as the rest is: give "
                f"--expert-tensor-parallel-size {self.tensor}, not {self.expert_tensor}"
            )
        if wrong:
            raise ConfigError("this layout does not fit the model: " + "; ".join(wrong))

    @property
    def data(self) -> int:
        """data-parallel size: the number of model replicas"""
        return self.world_size // (self.tensor * self.pipeline)

    def data_rank(self, rank: int) -> int:
        """Which replica's data a rank reads."""
        return rank // self.tensor % self.data

    def is_last_stage(self, rank: int) -> bool:
        return rank // (self.tensor * self.data) == self.pipeline - 1
