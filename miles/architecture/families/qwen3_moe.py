"""Qwen3-MoE: Qwen3's attention, and in every layer a router over experts in place of the MLP."""

from __future__ import annotations

from dataclasses import replace

from miles.architecture.config import HfConfig, ModelShape
from miles.architecture.families import _decoder
from miles.architecture.parameters import ExtraState, Parameter
from miles.errors import CheckpointError

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
    num_experts = config.whole("num_experts", 0) or config.whole("num_local_experts")
    num_chosen = config.whole("num_experts_per_tok")
    _require_several(config.where, num_chosen, num_experts)
    return replace(
        _decoder.shape(config, qk_layernorm=True),
        num_experts=num_experts,
        moe_router_topk=num_chosen,
        moe_ffn_hidden_size=config.whole("moe_intermediate_size"),
    )


def _require_several(where: str, num_chosen: int, num_experts: int) -> None:
    """Refuse a router that Megatron does not build.

    Raises:
        CheckpointError: a token goes through one expert, or through more than there are.
    """
    if num_chosen < 2:
        raise CheckpointError(
            f"{where}: num_experts_per_tok = {num_chosen}: with norm_topk_prob the weight of a "
            "single expert is always 1, so that the router would learn nothing, and megatron-core "
            "refuses it; at least 2 are supported"
        )
    if num_chosen > num_experts:
        raise CheckpointError(
            f"{where}: num_experts_per_tok = {num_chosen}, but num_experts = {num_experts}"
        )


def parameters(shape: ModelShape) -> tuple[Parameter, ...]:
    """Return the parameter map of a Qwen3-MoE model."""
    return (*_decoder.ends(shape), *_decoder.attention(shape), *_decoder.experts(shape))


def extra_states(shape: ModelShape) -> tuple[ExtraState, ...]:
    """Return the extra states of a Qwen3-MoE model."""
    return _decoder.extra_states(shape)
