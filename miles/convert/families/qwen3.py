"""Qwen3, dense: grouped queries, norms on queries and keys, gated MLP, tied embeddings in the small ones."""

from __future__ import annotations

from miles.architecture import ModelShape
from miles.convert.families import Parameter, decoder


def parameters(shape: ModelShape) -> tuple[Parameter, ...]:
    """The parameter map of a Qwen3 model."""
    return (*decoder.ends(shape), *decoder.attention(shape), *decoder.mlp(shape))
