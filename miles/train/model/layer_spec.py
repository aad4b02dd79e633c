"""The layers of a pipeline stage: Megatron's local specification, with our modules in it.

ModelShape, TransformerConfig, ComputeConfig -> TransformerBlockSubmodules
"""

from __future__ import annotations

import functools
from typing import Any

from miles.architecture.config import ModelShape
from miles.train.compute_config import ComputeConfig
from miles.train.model.attention import PackedAttention
from miles.train.model.norm import RMSNorm
from miles.train.model.swiglu import SwiGLU


def block_spec(shape: ModelShape, config: Any, compute: ComputeConfig) -> Any:
    """Return the specification of this pipeline stage's layers and of its last norm.

    Args:
        config: Megatron's `TransformerConfig`, which says how many layers the stage has.
        compute: with everything resolved that depends on the ranks.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    from miles.train.model.self_attention import PackedSelfAttention

    layer = get_gpt_layer_local_spec(
        num_experts=shape.num_experts, qk_layernorm=shape.qk_layernorm, normalization="RMSNorm"
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm

    head_norm = RMSNorm if shape.qk_layernorm else IdentityOp
    if compute.packed_rope and compute.rope_fusion and compute.norm_fusion:
        layer.submodules.self_attention.module = PackedSelfAttention
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ModuleSpec(module=PackedAttention, params={"compute": compute})
    attention.q_layernorm = head_norm
    attention.k_layernorm = head_norm

    mlp = _submodules_of(layer.submodules.mlp)
    if shape.num_experts is not None:
        mlp = _submodules_of(mlp.experts)
    mlp.activation_func = SwiGLU  # built where transformer_config says so

    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm
    )


def _submodules_of(spec: Any) -> Any:
    """Return the parts of a specification: `ModuleSpec` in megatron-core 0.16.1, `partial` in 0.19."""
    if isinstance(spec, functools.partial):
        return spec.keywords["submodules"]
    return spec.submodules
