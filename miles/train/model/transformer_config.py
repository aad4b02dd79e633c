"""Megatron's `TransformerConfig` for a model's shape on a layout of ranks."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from miles.architecture.config import ModelShape
from miles.errors import ConfigError
from miles.train.compute_config import ComputeConfig
from miles.train.model import device
from miles.train.model.dtypes import DTYPES
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.recompute_config import RecomputeConfig


def transformer_config(
    shape: ModelShape,
    layout: Layout,
    *,
    precision: Precision,
    recompute: RecomputeConfig,
    compute: ComputeConfig,
) -> Any:
    """Return Megatron's `TransformerConfig` for a shape on a layout.

    Raises:
        ConfigError: more layers to recompute than a pipeline stage has.
    """
    from megatron.core.transformer import TransformerConfig

    stage_layers = shape.num_layers // layout.pipeline
    if (recompute.num_layers or 0) > stage_layers:
        raise ConfigError(
            f"--recompute-num-layers {recompute.num_layers} is more than the {stage_layers} layers "
            "of a pipeline stage"
        )

    has_gpu = device.has_gpu()
    dtype = DTYPES[precision]
    return TransformerConfig(
        # the model
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
        **_expert_options(shape),
        # precision
        bf16=precision is Precision.BF16,
        fp16=precision is Precision.FP16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # the layout
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        sequence_parallel=layout.sequence_parallel,
        variable_seq_lengths=layout.pipeline > 1,
        # Megatron demands this one beside variable_seq_lengths, for dense models too.
        moe_token_dispatcher_type="alltoall",
        # the backward pass and the loss
        recompute_granularity=recompute.granularity,
        recompute_method=recompute.method,
        recompute_num_layers=recompute.num_layers,
        calculate_per_token_loss=True,
        # Megatron's fusions need Apex, Transformer Engine or torch.compile. Ours of SwiGLU takes
        # the place of Transformer Engine's.
        use_cpu_initialization=not has_gpu,
        use_te_activation_func=compute.swiglu_fusion,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=compute.grad_accumulation_fusion,  # by weight_gradients
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
    )


def _expert_options(shape: ModelShape) -> dict[str, Any]:
    """Return the options of a mixture of experts; none for a dense model."""
    if shape.num_experts is None:
        return {}
    return {
        "num_moe_experts": shape.num_experts,
        "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
        "moe_router_topk": shape.moe_router_topk,
        "moe_router_score_function": "softmax",
        # Softmax over the chosen experts: the same as over all experts, then normalised.
        "moe_router_pre_softmax": False,
        # Fine-tuning adds no balancing term to the loss.
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        # Grouped matrix products need Transformer Engine or the grouped_gemm package.
        "moe_grouped_gemm": False,
    }
