"""The memory of a rank: arithmetic on a model's shape, a layout and a micro-batch.

Weights, gradients and optimizer state are counted, as this trainer allocates them. Activations and
logits are estimated. The CUDA context, NCCL and fragmentation are not counted: leave a tenth of the
card to them. docs/memory.md explains the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

from miles.architecture.config import ModelShape
from miles.architecture.sizes import key_size, layer_parameters, padded_vocab_size, query_size
from miles.train.config import RecomputeConfig
from miles.train.optimizer_settings import OptimizerSettings
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision

_PLAIN_ADAM = OptimizerSettings()
"""Adam on the GPU, with its state in float32."""
_VALUE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Bytes of a value, by the names of the optimizer's flags."""
GRADIENT_BYTES = 4
"""Bytes of a gradient: gradients are summed in float32 (`grad_reduce_in_fp32`)."""


@dataclass(frozen=True)
class RankParameters:
    """The numbers of parameters on one rank."""

    dense: int
    """their optimizer state is divided over the data-parallel ranks"""
    experts: int
    """their optimizer state is divided over the ranks that hold the same experts"""

    @property
    def total(self) -> int:
        return self.dense + self.experts


@dataclass(frozen=True)
class StageMemory:
    """The memory of each rank of a pipeline stage, in bytes."""

    stage: int
    num_layers: int
    num_parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """those of all micro-batches that the stage has under way"""
    logits: int
    host: int = 0
    """offloaded optimizer state, in the memory of the machine"""

    @property
    def total(self) -> int:
        """Return the bytes on the GPU."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class ActivationValues:
    """The values that a stage keeps for the backward pass, for each token of a micro-batch."""

    per_micro_batch: float
    """kept for each micro-batch under way"""
    once: float
    """kept beside them, once"""


@dataclass(frozen=True)
class StateBytes:
    """The bytes of the optimizer's state for one parameter."""

    device: float
    """on the GPU"""
    host: float
    """in the memory of the machine"""


def estimate(
    shape: ModelShape,
    layout: Layout,
    *,
    precision: Precision,
    max_tokens_per_gpu: int,
    recompute: RecomputeConfig,
    optimizer: OptimizerSettings = _PLAIN_ADAM,
) -> tuple[StageMemory, ...]:
    """Return the memory of a rank of each pipeline stage.

    Args:
        precision: of weights and activations.
        max_tokens_per_gpu: tokens of a full micro-batch.
        optimizer: its flags say where its state lies, and in which precision.

    Raises:
        ConfigError: the model cannot be divided among the ranks of the layout.
    """
    layout.require_fits(shape)
    value_bytes = precision.num_bytes
    state = state_bytes(precision, optimizer)
    num_layers = shape.num_layers // layout.pipeline
    values = _activation_values(shape, layout, num_layers, recompute)

    stages = []
    for stage in range(layout.pipeline):
        parameters = _rank_parameters(shape, layout, stage)
        # Each data-parallel rank steps a part of the parameters.
        num_stepped = parameters.dense / layout.data + parameters.experts / layout.expert_data

        # The pipeline schedule is 1F1B: earlier stages have more micro-batches under way.
        num_under_way = layout.pipeline - stage
        values_per_token = values.per_micro_batch * num_under_way + values.once

        logits = 0
        if stage == layout.pipeline - 1:
            logits = _logits_bytes(shape, layout, max_tokens_per_gpu, value_bytes)

        stages.append(
            StageMemory(
                stage=stage,
                num_layers=num_layers,
                num_parameters=parameters.total,
                weights=parameters.total * value_bytes,
                gradients=parameters.total * GRADIENT_BYTES,
                optimizer=int(num_stepped * state.device),
                activations=int(values_per_token * max_tokens_per_gpu * value_bytes),
                logits=logits,
                host=int(num_stepped * state.host),
            )
        )
    return tuple(stages)


def state_bytes(precision: Precision, optimizer: OptimizerSettings) -> StateBytes:
    """Return the bytes of the optimizer's state for a parameter: master weight and two moments."""
    moments = sum(_VALUE_BYTES[t] for t in (optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype))
    master = 4 if precision.has_master_weights else 0
    if optimizer.precision_aware and not optimizer.cpu_offload:
        master = _VALUE_BYTES[optimizer.main_params_dtype]
        # Transformer Engine keeps the half of a float32 weight that bfloat16 has not.
        if precision is Precision.BF16 and master == 4:
            master = 2
    if not optimizer.cpu_offload:
        return StateBytes(device=master + moments, host=0)

    offloaded = optimizer.offload_fraction
    # On the machine a copy of the gradient lies beside them, from which Adam takes its step.
    host = 4 + moments + GRADIENT_BYTES
    return StateBytes(device=(1 - offloaded) * (master + moments), host=offloaded * host)


def _logits_bytes(shape: ModelShape, layout: Layout, num_tokens: int, value_bytes: int) -> int:
    """Return the bytes of the logits: once in the model's precision and twice in float32."""
    return num_tokens * _vocabulary_rows(shape, layout) * (value_bytes + 8)


def _vocabulary_rows(shape: ModelShape, layout: Layout) -> int:
    """Return the rows of the embedding on each rank, with those of padding."""
    return padded_vocab_size(shape, layout.tensor) // layout.tensor


def _rank_parameters(shape: ModelShape, layout: Layout, stage: int) -> RankParameters:
    """Return the parameters of each rank of a pipeline stage."""
    tensor = layout.tensor
    part = layer_parameters(shape)
    layer = part.attention // tensor + part.qkv_bias // tensor + part.norms
    layer += part.mlp // tensor + part.router
    experts = (shape.num_experts or 0) // layout.expert * part.expert // layout.expert_tensor
    # Megatron keeps experts that are not spread in one buffer with the rest.
    if layout.expert == 1:
        layer += experts
        experts = 0

    num_layers = shape.num_layers // layout.pipeline
    dense = num_layers * layer
    embedding = _vocabulary_rows(shape, layout) * shape.hidden_size
    is_first = stage == 0
    is_last = stage == layout.pipeline - 1
    if is_first:
        dense += embedding
    if is_last:
        last_norm = shape.hidden_size
        dense += last_norm
        # A tied embedding is on both ends, once where they are the same stage.
        if not shape.tied_embeddings or not is_first:
            dense += embedding
    return RankParameters(dense, num_layers * experts)


def _activation_values(
    shape: ModelShape, layout: Layout, num_layers: int, recompute: RecomputeConfig
) -> ActivationValues:
    """Return the values that a stage of `num_layers` layers keeps."""
    full_layer = _layer_values(shape, layout)
    layer_input = _residual_values(shape, layout)
    if recompute.granularity != "full":
        return ActivationValues(num_layers * full_layer, 0.0)

    num_recomputed = recompute.num_layers or 1
    if recompute.method == "uniform":
        num_pieces = -(-num_layers // num_recomputed)
        return ActivationValues(num_pieces * layer_input, num_recomputed * full_layer)
    kept = num_recomputed * layer_input + (num_layers - num_recomputed) * full_layer
    return ActivationValues(kept, full_layer)


def _residual_values(shape: ModelShape, layout: Layout) -> float:
    """Return the values of the residual stream on a rank, for one token."""
    return shape.hidden_size / (layout.tensor if layout.sequence_parallel else 1)


def _layer_values(shape: ModelShape, layout: Layout) -> float:
    """Return the values that one layer keeps for one token.

    The formula is that of Korthikanti et al. 2022, section 4, for this layer: its attention keeps
    no scores, and its norms and gated activation are fused, as they are on a GPU.
    """
    # The input and the output of each of two norms.
    norms = 4 * _residual_values(shape, layout)

    # Queries, keys and values, and the output of attention, which is projected.
    queries = query_size(shape) / layout.tensor
    keys = key_size(shape) / layout.tensor
    attention = 2 * queries + 2 * keys
    if shape.qk_layernorm:
        attention += queries + keys  # before their norms

    # The gate, the up projection, and their product.
    if shape.num_experts is None:
        return norms + attention + 3 * shape.ffn_hidden_size / layout.tensor

    # A token is copied for each of its experts, on its way in and on its way out.
    gated = 3 * shape.moe_ffn_hidden_size / layout.expert_tensor
    return norms + attention + shape.moe_router_topk * (2 * shape.hidden_size + gated)
