"""Qwen2 and Qwen2.5: grouped queries, a bias on queries, keys and values, gated MLP, in small ones tied embeddings."""

from __future__ import annotations

from miles.architecture.config import HfConfig, ModelShape
from miles.architecture.families import Parameter, _decoder

ARCHITECTURE = "Qwen2ForCausalLM"


def shape(config: HfConfig) -> ModelShape:
    """The shape that a Qwen2 configuration describes; it does not name the bias, which every one has."""
    return _decoder.shape(config, add_qkv_bias=True)


def parameters(shape: ModelShape) -> tuple[Parameter, ...]:
    """The parameter map of a Qwen2 model."""
    return (*_decoder.ends(shape), *_decoder.attention(shape), *_decoder.mlp(shape))
