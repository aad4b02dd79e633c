"""Qwen2 and Qwen2.5: grouped queries with a bias, gated MLP, tied embeddings in the small ones."""

from __future__ import annotations

from miles.architecture.config import HfConfig, ModelShape
from miles.architecture.families import _decoder
from miles.architecture.parameters import ExtraState, Parameter

ARCHITECTURE = "Qwen2ForCausalLM"


def shape(config: HfConfig) -> ModelShape:
    """Return the shape that a Qwen2 configuration describes. All have the bias; none names it."""
    return _decoder.shape(config, add_qkv_bias=True)


def parameters(shape: ModelShape) -> tuple[Parameter, ...]:
    """Return the parameter map of a Qwen2 model."""
    return (*_decoder.ends(shape), *_decoder.attention(shape), *_decoder.mlp(shape))


def extra_states(shape: ModelShape) -> tuple[ExtraState, ...]:
    """Return the extra states of a Qwen2 model."""
    return _decoder.extra_states(shape)
