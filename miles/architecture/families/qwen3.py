"""Qwen3, dense: grouped queries with norms, gated MLP, tied embeddings in the small ones."""

from __future__ import annotations

from miles.architecture.config import HfConfig, ModelShape
from miles.architecture.families import _decoder
from miles.architecture.parameters import ExtraState, Parameter

ARCHITECTURE = "Qwen3ForCausalLM"


def shape(config: HfConfig) -> ModelShape:
    """Return the shape that a Qwen3 configuration describes."""
    return _decoder.shape(config, head_dim=128, qk_layernorm=True)


def parameters(shape: ModelShape) -> tuple[Parameter, ...]:
    """Return the parameter map of a Qwen3 model."""
    return (*_decoder.ends(shape), *_decoder.attention(shape), *_decoder.mlp(shape))


def extra_states(shape: ModelShape) -> tuple[ExtraState, ...]:
    """Return the extra states of a Qwen3 model."""
    return _decoder.extra_states(shape)
