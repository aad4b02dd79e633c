"""Qwen2 and Qwen2.5: grouped queries, a bias on queries, keys and values, gated MLP, in small ones tied embeddings."""

from __future__ import annotations

from miles.architecture import ModelShape
from miles.convert.families import Parameter, decoder


def parameters(shape: ModelShape) -> tuple[Parameter, ...]:
    """The parameter map of a Qwen2 model."""
    return (*decoder.ends(shape), *decoder.attention(shape), *decoder.mlp(shape))
