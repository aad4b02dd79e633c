"""Qwen3-MoE: Qwen3's attention, and in every layer a router over experts in place of the MLP."""

from __future__ import annotations

from dataclasses import replace

from miles.architecture.config import HfConfig, ModelShape
from miles.architecture.families import _decoder
from miles.architecture.parameters import ExtraState, Parameter

ARCHITECTURE = "Qwen3MoeForCausalLM"


def shape(config: HfConfig) -> ModelShape:
    """Return the shape that a Qwen3-MoE configuration describes.

    All layers have experts, and the weights of a token's experts add up to one.
    """
    config.require(
        ("norm_topk_prob", config.get("norm_topk_prob", False), True),
        ("decoder_sparse_step", config.get("decoder_sparse_step", 1), 1),
        ("mlp_only_layers", config.get("mlp_only_layers", []), []),
    )
    return replace(
        _decoder.shape(config, qk_layernorm=True),
        num_experts=int(config.get("num_experts") or config["num_local_experts"]),
        moe_router_topk=int(config["num_experts_per_tok"]),
        moe_ffn_hidden_size=int(config["moe_intermediate_size"]),
    )


def parameters(shape: ModelShape) -> tuple[Parameter, ...]:
    """Return the parameter map of a Qwen3-MoE model."""
    return (*_decoder.ends(shape), *_decoder.attention(shape), *_decoder.experts(shape))


def extra_states(shape: ModelShape) -> tuple[ExtraState, ...]:
    """Return the extra states of a Qwen3-MoE model."""
    return _decoder.extra_states(shape)
