"""The memory of a rank: arithmetic on a model's shape, a layout and a micro-batch.

Weights, gradients and optimizer state are counted, as this trainer allocates them. Activations and
the loss are estimated, as if every token were trained. The CUDA context, NCCL and fragmentation are
not counted: leave a tenth of the card to them. docs/memory.md explains the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from miles.architecture.adapter import (
    MEGATRON_NAMES,
    ROW_PARALLEL_TARGETS,
    AdapterShape,
    projection_sizes,
)
from miles.architecture.config import ModelShape
from miles.architecture.sizes import key_size, layer_parameters, padded_vocab_size, query_size
from miles.train.compute_config import AS_USUAL, ComputeConfig
from miles.train.estimate.host_memory import rounded_up_bytes, saving_bytes
from miles.train.optimizer_settings import OptimizerSettings
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.recompute_config import KEEP_ALL, RecomputeConfig

_PLAIN_ADAM = OptimizerSettings()
"""Adam on the GPU, with its state in float32."""
_VALUE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Bytes of a value, by the names of the optimizer's flags."""
_FLOAT32_BYTES = 4
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
    """with those of an adapter"""
    num_trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """those of all micro-batches that the stage has under way"""
    loss: int
    """the output layer's logits and gradients, on the last stage"""
    host: int = 0
    """offloaded optimizer state, in the memory of the machine"""
    host_rounding: int = 0
    """by which its pinned blocks are larger"""
    host_saving: int = 0
    """in the memory of the machine, while a checkpoint is begun"""

    @property
    def total(self) -> int:
        """Return the bytes on the GPU."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


@dataclass(frozen=True)
class ActivationBytes:
    """The bytes that a stage keeps for the backward pass, for each token of a micro-batch."""

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


@dataclass(frozen=True)
class Training:
    """The settings of training that the memory depends on."""

    precision: Precision
    """of weights and activations"""
    recompute: RecomputeConfig = KEEP_ALL
    optimizer: OptimizerSettings = _PLAIN_ADAM
    """its flags say where its state lies, and in which precision"""
    compute: ComputeConfig = AS_USUAL
    """what it leaves to the device is what GPUs take"""
    adapter: AdapterShape | None = None
    """that alone is trained; None: all weights are"""


def estimate(
    shape: ModelShape, layout: Layout, training: Training, max_tokens_per_gpu: int
) -> tuple[StageMemory, ...]:
    """Return the memory of a rank of each pipeline stage, on GPUs.

    Args:
        max_tokens_per_gpu: tokens of a full micro-batch.

    Raises:
        ConfigError: the model cannot be divided among the ranks of the layout.
    """
    precision, adapter, compute = training.precision, training.adapter, training.compute
    layout.require_fits(shape)
    if compute.grouped_experts is None and precision is not Precision.BF16:
        compute = replace(compute, grouped_experts=False)  # as `experts.can_group` has it
    compute = compute.resolved(has_gpus=True, data_parallel=layout.data)

    value_bytes = precision.num_bytes
    state = state_bytes(precision, training.optimizer)
    num_layers = shape.num_layers // layout.pipeline
    layer_bytes = _layer_bytes(shape, layout, value_bytes, compute, adapter)
    input_bytes = _residual_values(shape, layout) * value_bytes
    kept = _kept_bytes(num_layers, layer_bytes, input_bytes, training.recompute)

    joined = ActivationBytes(0.0, 0.0)
    if adapter is not None:
        joined_bytes = _joined_values(shape, layout, adapter) * value_bytes
        joined = _kept_bytes(num_layers, joined_bytes, 0.0, training.recompute)

    stages = []
    for stage in range(layout.pipeline):
        parameters = trained = _rank_parameters(shape, layout, stage)
        num_parameters = parameters.total
        if adapter is not None:
            trained = RankParameters(num_layers * _adapter_parameters(shape, layout, adapter), 0)
            num_parameters += trained.total
        # Each data-parallel rank steps a part of the parameters.
        num_stepped = trained.dense / layout.data + trained.experts / layout.expert_data

        # The pipeline schedule is 1F1B: earlier stages have more micro-batches under way.
        num_under_way = layout.pipeline - stage
        per_micro_batch = kept.per_micro_batch + _rotation_bytes(shape)
        bytes_per_token = per_micro_batch * num_under_way + kept.once

        loss = 0
        if stage == layout.pipeline - 1:
            # The input of the last norm, and a number of it.
            bytes_per_token += input_bytes + _FLOAT32_BYTES
            loss = _loss_bytes(shape, layout, max_tokens_per_gpu, value_bytes, compute, adapter)

        stages.append(
            StageMemory(
                stage=stage,
                num_layers=num_layers,
                num_parameters=num_parameters,
                num_trained=trained.total,
                weights=num_parameters * value_bytes,
                gradients=trained.total * GRADIENT_BYTES,
                optimizer=int(num_stepped * state.device),
                activations=int(
                    bytes_per_token * max_tokens_per_gpu
                    + joined.per_micro_batch * num_under_way
                    + joined.once
                ),
                loss=loss,
                host=int(num_stepped * state.host),
                host_rounding=_rounding_bytes(shape, layout, stage, training.optimizer),
                host_saving=saving_bytes((trained.dense, trained.experts), compute, layout.data),
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


def _rounding_bytes(
    shape: ModelShape, layout: Layout, stage: int, optimizer: OptimizerSettings
) -> int:
    """Return by how much more than its offloaded state a rank has of the machine's memory."""
    if not optimizer.cpu_offload:
        return 0
    num_embeddings = (stage == 0) + (stage == layout.pipeline - 1)
    if layout.pipeline == 1 and shape.tied_embeddings:
        num_embeddings = 1
    return int(optimizer.offload_fraction * rounded_up_bytes(shape, layout, num_embeddings))


def _loss_bytes(
    shape: ModelShape,
    layout: Layout,
    num_tokens: int,
    value_bytes: int,
    compute: ComputeConfig,
    adapter: AdapterShape | None,
) -> int:
    """Return the most bytes that the output layer and the loss take, if every token is trained."""
    num_rows = _vocabulary_rows(shape, layout)
    if compute.loss_chunk_size == 0:
        # The logits of all tokens: once in the model's precision and twice in float32.
        return num_tokens * num_rows * (value_bytes + 2 * _FLOAT32_BYTES)

    # The formulas of `output_loss`.
    hidden = num_tokens * shape.hidden_size * value_bytes
    bytes_of_logit = value_bytes if compute.loss_fusion else value_bytes + _FLOAT32_BYTES
    logits = min(compute.loss_chunk_size, num_tokens) * num_rows * bytes_of_logit

    handed_on = hidden
    is_trained = adapter is None  # the output layer has no adapter
    if is_trained and (not shape.tied_embeddings or layout.pipeline > 1):
        handed_on += num_rows * shape.hidden_size * value_bytes
    return hidden + max(logits, handed_on)


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


def _adapter_parameters(shape: ModelShape, layout: Layout, adapter: AdapterShape) -> int:
    """Return the parameters of one layer's adapter on each rank.

    Of A and B, the one that is as long as the divided side of the projection is divided.
    """
    num_parameters = 0
    for target in adapter.targets:
        num_out, num_in = projection_sizes(shape, target)
        if target in ROW_PARALLEL_TARGETS:
            num_in //= layout.tensor
        else:
            num_out //= layout.tensor
        num_parameters += adapter.rank * (num_out + num_in)
    return num_parameters


def _kept_bytes(
    num_layers: int, layer: float, layer_input: float, recompute: RecomputeConfig
) -> ActivationBytes:
    """Return what a stage of `num_layers` layers keeps of them.

    Args:
        layer: bytes of a layer for one token.
        layer_input: bytes of its input for one token.
    """
    if recompute.granularity != "full":
        return ActivationBytes(num_layers * layer, 0.0)

    num_recomputed = recompute.num_layers or 1
    if recompute.method == "uniform":
        num_pieces = -(-num_layers // num_recomputed)
        return ActivationBytes(num_pieces * layer_input, num_recomputed * layer)
    kept = num_recomputed * layer_input + (num_layers - num_recomputed) * layer
    return ActivationBytes(kept, layer)


def _residual_values(shape: ModelShape, layout: Layout) -> float:
    """Return the values of the residual stream on a rank, for one token."""
    return shape.hidden_size / (layout.tensor if layout.sequence_parallel else 1)


def _rotation_bytes(shape: ModelShape) -> int:
    """Return the bytes of cosine and sine for one token, which all layers share."""
    return 2 * shape.kv_channels * _FLOAT32_BYTES


def _layer_bytes(
    shape: ModelShape,
    layout: Layout,
    value_bytes: int,
    compute: ComputeConfig,
    adapter: AdapterShape | None,
) -> float:
    """Return the bytes that one layer keeps for one token.

    The formula is that of Korthikanti et al. 2022, section 4, for this layer: its attention keeps
    no scores, and of its norms and its gated activation only the input is kept. The input of a
    frozen projection is kept for its adapter alone.
    """
    # The input of each of two norms, and their output, which is the input of projections.
    has_input = _kept_inputs(adapter)
    num_outputs = has_input["linear_qkv"] + has_input["linear_fc1"]
    norms = (2 + num_outputs) * _residual_values(shape, layout)

    # Queries, keys and values, and the output of attention, which is projected.
    queries = query_size(shape) / layout.tensor
    keys = key_size(shape) / layout.tensor
    attention = 2 * queries + 2 * keys

    # A number in float32 for each row of a norm, and for each head of attention.
    heads = shape.num_attention_heads / layout.tensor
    rows = 2 / (layout.tensor if layout.sequence_parallel else 1)
    is_one_kernel = compute.packed_rope and compute.rope_fusion and compute.norm_fusion
    if shape.qk_layernorm and is_one_kernel:
        # The projection as it is: the kernel that divides it computes the norms again.
        attention += queries + 2 * keys
    elif shape.qk_layernorm:
        attention += queries + keys  # before their norms
        rows += heads + shape.num_query_groups / layout.tensor

    values = norms + attention + _mlp_values(shape, layout, compute, adapter)
    if adapter is not None:
        values += _adapter_values(layout, adapter)
    return values * value_bytes + (rows + heads) * _FLOAT32_BYTES


def _kept_inputs(adapter: AdapterShape | None) -> dict[str, bool]:
    """Return whether the input of each of Megatron's matrices is kept, for a gradient."""
    if adapter is None:
        return dict.fromkeys(MEGATRON_NAMES, True)
    return {
        name: not set(targets).isdisjoint(adapter.targets)
        for name, targets in MEGATRON_NAMES.items()
    }


def _adapter_values(layout: Layout, adapter: AdapterShape) -> float:
    """Return the values that a layer's adapter keeps for one token: what A makes of each input."""
    values = 0.0
    for target in adapter.targets:
        is_divided = layout.sequence_parallel and target in ROW_PARALLEL_TARGETS
        values += adapter.rank / (layout.tensor if is_divided else 1)
    return values


def _joined_values(shape: ModelShape, layout: Layout, adapter: AdapterShape) -> float:
    """Return the values of a layer's A and B that are joined for each micro-batch.

    They are those of the projections that are one matrix in Megatron (`model.adapters`).
    """
    values = 0.0
    for targets in MEGATRON_NAMES.values():
        if len(targets) == 1:
            continue
        pairs = [target for target in targets if target in adapter.targets]
        width = adapter.rank * len(pairs)
        for target in targets:
            num_out, num_in = projection_sizes(shape, target)
            values += width * num_out / layout.tensor
            if target in pairs and len(pairs) > 1:
                values += adapter.rank * num_in
    return values


def _mlp_values(
    shape: ModelShape, layout: Layout, compute: ComputeConfig, adapter: AdapterShape | None
) -> float:
    """Return the values that the MLP or the experts of a layer keep for one token."""
    # The gate, the up projection, and their product; Megatron's own SwiGLU keeps two more.
    gated = 3 if compute.swiglu_fusion else 5
    if shape.num_experts is None:
        gated -= 0 if _kept_inputs(adapter)["linear_fc2"] else 1
        return gated * shape.ffn_hidden_size / layout.tensor

    # A copy of the token for each of its experts. Where one expert is computed after another, the
    # product is kept before and after the router's weight. A tensor-parallel rank sends copies of
    # its own tokens, and ranks that share an expert all get its copies: as many on each rank, if the
    # experts get as many.
    num_copies = shape.moe_router_topk * layout.expert_tensor / layout.tensor
    gated = 3 if compute.grouped_experts else gated + 1
    width = shape.moe_ffn_hidden_size / layout.expert_tensor
    return num_copies * (shape.hidden_size + gated * width)
