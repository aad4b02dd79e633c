"""Qwen3-MoE: Qwen3's attention, and in every layer a router over experts in place of the MLP."""

from __future__ import annotations

from miles.architecture import ModelShape
from miles.convert.families import Parameter, decoder


def parameters(shape: ModelShape) -> tuple[Parameter, ...]:
    """The parameter map of a Qwen3-MoE model."""
    return (*decoder.ends(shape), *decoder.attention(shape), *decoder.experts(shape))
