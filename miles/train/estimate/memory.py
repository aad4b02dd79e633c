"""What a rank holds in memory: arithmetic on a model's shape, a layout and a micro-batch. docs/memory.md explains it.

Weights, gradients and optimizer state are counted, as this trainer allocates them; activations and logits estimated.
Nothing here is what the CUDA context, NCCL or fragmentation take: leave a tenth of the card to them.
"""

from __future__ import annotations

from dataclasses import dataclass

from miles.architecture.config import ModelShape
from miles.architecture.sizes import embedding_parameters, key_size, layer_parameters, query_size
from miles.train.config import RecomputeConfig
from miles.train.parallel_layout import Layout

GRADIENT_BYTES = 4
"""A value: gradients are summed in float32 (`grad_reduce_in_fp32`)."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters on one rank."""

    dense: int
    """spread over data-parallel ranks by the optimizer"""
    experts: int
    """spread over those ranks alone that hold the same experts"""

    @property
    def total(self) -> int:
        return self.dense + self.experts


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of a pipeline stage."""

    stage: int
    num_layers: int
    num_parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """of all micro-batches that the stage has under way"""
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def estimate(
    shape: ModelShape,
    layout: Layout,
    *,
    bf16: bool,
    max_tokens_per_gpu: int,
    recompute: RecomputeConfig,
) -> tuple[StageMemory, ...]:
    """The memory of a rank of each pipeline stage.

    Args:
        bf16: weights and activations of 2 bytes, and float32 masters in the optimizer; else all of 4.
        max_tokens_per_gpu: tokens of a full micro-batch.

    Raises:
        ConfigError: the model cannot be cut so.
    """
    layout.require_fits(shape)
    value_bytes = 2 if bf16 else 4
    state_bytes = 12 if bf16 else 8  # two moments, and in bfloat16 the master weights
    expert_data = layout.world_size // (layout.expert * layout.expert_tensor * layout.pipeline)
    stages = []
    for stage in range(layout.pipeline):
        local = _parameters(shape, layout, stage)
        layers = shape.num_layers // layout.pipeline
        is_last = stage == layout.pipeline - 1
        logits = (
            max_tokens_per_gpu * (shape.vocab_size // layout.tensor) * (value_bytes + 8)
            if is_last
            else 0
        )
        in_flight = layout.pipeline - stage  # of the schedule 1F1B
        kept, once = _activation_values(shape, layout, layers, recompute)
        stages.append(
            StageMemory(
                stage=stage,
                num_layers=layers,
                num_parameters=local.total,
                weights=local.total * value_bytes,
                gradients=local.total * GRADIENT_BYTES,
                optimizer=local.dense * state_bytes // layout.data
                + local.experts * state_bytes // expert_data,
                activations=int((kept * in_flight + once) * max_tokens_per_gpu * value_bytes),
                logits=logits,
            )
        )
    return tuple(stages)


def _parameters(shape: ModelShape, layout: Layout, stage: int) -> Parameters:
    tensor = layout.tensor
    part = layer_parameters(shape)
    layer = part.attention // tensor + part.qkv_bias // tensor + part.norms
    layer += part.mlp // tensor + part.router
    experts = (shape.num_experts or 0) // layout.expert * part.expert // layout.expert_tensor
    if layout.expert == 1:  # Megatron then has them in one buffer with the rest
        layer, experts = layer + experts, 0

    layers = shape.num_layers // layout.pipeline
    dense = layers * layer
    embedding = embedding_parameters(shape) // tensor
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    if is_first:
        dense += embedding
    if is_last:
        dense += shape.hidden_size  # the last norm
        if not shape.tied_embeddings or not is_first:  # a tied one is at both ends
            dense += embedding
    return Parameters(dense, layers * experts)


def _activation_values(
    shape: ModelShape, layout: Layout, num_layers: int, recompute: RecomputeConfig
) -> tuple[float, float]:
    """Values a token that a stage keeps for the backward pass: of each micro-batch under way, and once beside them."""
    whole = _layer_values(shape, layout)
    entry = shape.hidden_size / (layout.tensor if layout.sequence_parallel else 1)
    if recompute.granularity != "full":
        return num_layers * whole, 0.0
    again = recompute.num_layers or 1
    if recompute.method == "uniform":
        return -(-num_layers // again) * entry, again * whole
    return again * entry + (num_layers - again) * whole, whole


def _layer_values(shape: ModelShape, layout: Layout) -> float:
    """Values a token that one layer keeps: Korthikanti et al. 2022, section 4, for this layer, whose attention keeps no
    scores, and whose norms and gated activation are fused, as they are on a GPU."""
    tensor = layout.tensor
    stream = shape.hidden_size / (
        tensor if layout.sequence_parallel else 1
    )  # each of two norms: what goes in and out
    queries = query_size(shape) / tensor
    keys = key_size(shape) / tensor
    attention = (
        2 * queries + 2 * keys
    )  # queries, keys, values, and what attention gives, which is projected
    attention += (queries + keys) if shape.qk_layernorm else 0  # before their norms
    if shape.num_experts is None:
        inner, copies = shape.ffn_hidden_size / tensor, 1.0
        entering = 0.0
    else:
        # A token is copied for each of its experts.
        inner, copies = (
            shape.moe_ffn_hidden_size / layout.expert_tensor,
            float(shape.moe_router_topk),
        )
        entering = 2 * copies * shape.hidden_size  # into the experts, and out of them
    gated = 3 * inner  # gate, up projection, and their product
    return 4 * stream + attention + entering + copies * gated
