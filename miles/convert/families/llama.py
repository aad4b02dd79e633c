"""Llama 3, 3.1 and 3.2: grouped queries, gated MLP, tied embeddings in the small ones. That 3.1 and 3.2 scale their
rotary frequencies is a matter of the configuration: no parameter holds it."""

from __future__ import annotations

from miles.architecture import ModelShape
from miles.convert.families import Parameter, decoder


def parameters(shape: ModelShape) -> tuple[Parameter, ...]:
    """The parameter map of a Llama model."""
    return (*decoder.ends(shape), *decoder.attention(shape), *decoder.mlp(shape))
