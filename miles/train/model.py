"""A Megatron `GPTModel` from a `ModelShape`: the configuration, the layer spec, the packed forward pass."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from miles.architecture import ModelShape
from miles.train.attention import PackedAttention
from miles.train.topology import Layout

if TYPE_CHECKING:
    from miles.data.types import MicroBatch


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


def transformer_config(shape: ModelShape, layout: Layout, *, bf16: bool) -> Any:
    """Megatron's `TransformerConfig` for a shape on a layout."""
    from megatron.core.transformer import TransformerConfig

    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if bf16 else torch.float32
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
        sequence_parallel=layout.sequence_parallel,
        variable_seq_lengths=layout.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # what Megatron asks for beside variable_seq_lengths, dense or not
        calculate_per_token_loss=True,
        use_cpu_initialization=not on_gpu,
        # The fusions below need CUDA kernels of Apex or Transformer Engine.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=False,
    )


def build_model(shape: ModelShape, layout: Layout, *, bf16: bool) -> Any:
    """A `GPTModel` (this rank's part of it), on the GPU where there is one.

    Parallel state must be initialised (`topology.initialize`). Weights are Megatron's random ones.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    config = transformer_config(shape, layout, bf16=bf16)
    layer = get_gpt_layer_local_spec(qk_layernorm=shape.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    attention.q_layernorm = attention.k_layernorm = RMSNorm if shape.qk_layernorm else IdentityOp
    block = TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)
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
            parallel_output=True,
        )
    model.model_type = "encoder_or_decoder"  # read by the pipeline schedules
    return model.cuda() if torch.cuda.is_available() else model


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
