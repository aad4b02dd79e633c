"""A Megatron `GPTModel` from a `ModelShape`: the configuration, the layer spec, the packed forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from miles.architecture.config import ModelShape
from miles.data.types import DUMMY_ROW_ID, MicroBatch
from miles.errors import ConfigError
from miles.train.config import RecomputeConfig
from miles.train.model.attention import PackedAttention
from miles.train.parallel_layout import Layout


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm with Megatron's constructor.

    Megatron's local norm refuses sequence parallelism; here the weight is marked, so that its gradient is
    summed over the tensor-parallel ranks, each of which saw other tokens.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


def transformer_config(
    shape: ModelShape, layout: Layout, *, bf16: bool, recompute: RecomputeConfig
) -> Any:
    """Megatron's `TransformerConfig` for a shape on a layout.

    Raises:
        ConfigError: more layers to recompute than a pipeline stage has.
    """
    from megatron.core.transformer import TransformerConfig

    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if bf16 else torch.float32
    stage_layers = shape.num_layers // layout.pipeline
    if (recompute.num_layers or 0) > stage_layers:
        raise ConfigError(
            f"--recompute-num-layers {recompute.num_layers} is more than the {stage_layers} layers of a pipeline stage"
        )
    experts: dict[str, Any] = {}
    if shape.num_experts is not None:
        experts = {
            "num_moe_experts": shape.num_experts,
            "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
            "moe_router_topk": shape.moe_router_topk,
            "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": False,  # softmax over the chosen ones: as over all, and normalised afterwards
            "moe_router_load_balancing_type": "none",  # fine-tuning adds no term to the loss
            "moe_router_dtype": "fp32",
            "moe_grouped_gemm": False,  # needs Transformer Engine or the grouped_gemm package
        }
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        qk_layernorm=shape.qk_layernorm,
        add_bias_linear=False,
        add_qkv_bias=shape.add_qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        sequence_parallel=layout.sequence_parallel,
        recompute_granularity=recompute.granularity,
        recompute_method=recompute.method,
        recompute_num_layers=recompute.num_layers,
        variable_seq_lengths=layout.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # what Megatron asks for beside variable_seq_lengths, dense or not
        calculate_per_token_loss=True,
        use_cpu_initialization=not on_gpu,
        # The fusions below need CUDA kernels of Apex or Transformer Engine.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=False,
        **experts,
    )


def build_model(
    shape: ModelShape, layout: Layout, *, bf16: bool, recompute: RecomputeConfig
) -> Any:
    """A `GPTModel` (this rank's part of it), on the GPU where there is one.

    Parallel state must be initialised (`topology.initialize`). Weights are Megatron's random ones.

    Raises:
        ConfigError: the model cannot be cut so.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    if shape.num_experts is not None:
        _answer_for_transformer_engine()
    layout.require_fits(shape)
    config = transformer_config(shape, layout, bf16=bf16, recompute=recompute)
    layer = get_gpt_layer_local_spec(
        num_experts=shape.num_experts, qk_layernorm=shape.qk_layernorm, normalization="RMSNorm"
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    attention.q_layernorm = attention.k_layernorm = RMSNorm if shape.qk_layernorm else IdentityOp
    block = TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GPTModel(
            config=config,
            transformer_layer_spec=block,
            vocab_size=shape.vocab_size,
            max_sequence_length=shape.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=int(shape.rotary_base),
            rope_scaling=shape.rope_scaling_factor is not None,
            rope_scaling_factor=shape.rope_scaling_factor or 1.0,
            parallel_output=True,
        )
    model.model_type = "encoder_or_decoder"  # read by the pipeline schedules
    return model.cuda() if torch.cuda.is_available() else model


def _answer_for_transformer_engine() -> None:
    """Without Transformer Engine, 0.16.1's router asks for a name that its module then does not define."""
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)


def single(input_ids: Sequence[int]) -> MicroBatch:
    """One sequence, of which nothing is trained."""
    ids = np.asarray(input_ids, np.int64)
    return MicroBatch(
        input_ids=ids,
        labels=np.zeros_like(ids),
        position_ids=np.arange(len(ids), dtype=np.int64),
        loss_mask=np.zeros(len(ids), np.float32),
        cu_seqlens=np.array([0, len(ids)], np.int32),
        source_ids=np.zeros(1, np.int32),
        row_ids=np.full(1, DUMMY_ROW_ID, np.int64),
    )


def padded(micro_batch: MicroBatch, layout: Layout) -> MicroBatch:
    """With sequence parallelism, a micro-batch of a multiple of the tensor size in tokens; else as it is.

    What is missing comes behind the samples, as a segment of its own in which nothing is trained.
    """
    missing = -len(micro_batch.input_ids) % layout.tensor if layout.sequence_parallel else 0
    if not missing:
        return micro_batch
    zeros = np.zeros(missing, np.int64)
    return replace(
        micro_batch,
        input_ids=np.concatenate([micro_batch.input_ids, zeros]),
        labels=np.concatenate([micro_batch.labels, zeros]),
        position_ids=np.concatenate([micro_batch.position_ids, np.arange(missing)]),
        loss_mask=np.concatenate([micro_batch.loss_mask, zeros.astype(np.float32)]),
        cu_seqlens=np.append(micro_batch.cu_seqlens, micro_batch.cu_seqlens[-1] + missing).astype(
            np.int32
        ),
        source_ids=np.append(micro_batch.source_ids, 0).astype(
            np.int32
        ),  # a valid index; its mask adds nothing
        row_ids=np.append(micro_batch.row_ids, DUMMY_ROW_ID),
    )


def forward_packed(model: Any, micro_batch: MicroBatch, *, labels: bool) -> Tensor:
    """Runs a packed micro-batch.

    Args:
        model: a `GPTModel`, or the DDP wrapper around one.
        labels: whether to compute the loss.

    Returns:
        On the last pipeline stage: with labels, the loss of every token, float32 [1, tokens]; without, this
        rank's part of the logits, [1, tokens, vocabulary / TP]. On other stages: what the next one takes.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    device = "cuda" if torch.cuda.is_available() else "cpu"
    cu_seqlens = torch.from_numpy(np.array(micro_batch.cu_seqlens)).to(device)
    longest = int(np.diff(micro_batch.cu_seqlens).max())
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )

    def row(values: Any) -> Tensor:  # a copy: arrays from the object store are read-only
        return torch.from_numpy(np.array(values))[None].to(device)

    return model(
        input_ids=row(micro_batch.input_ids),
        position_ids=row(micro_batch.position_ids),
        attention_mask=None,
        labels=row(micro_batch.labels) if labels else None,
        packed_seq_params=packed,
    )
