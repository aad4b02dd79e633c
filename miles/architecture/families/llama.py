"""Llama 3, 3.1 and 3.2: grouped queries, gated MLP, tied embeddings in the small ones.

3.1 and 3.2 scale their rotary frequencies. No parameter holds that: it is a setting of the shape.
"""

from __future__ import annotations

from miles.architecture.config import HfConfig, ModelShape
from miles.architecture.families import _decoder
from miles.architecture.parameters import ExtraState, Parameter

ARCHITECTURE = "LlamaForCausalLM"

ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The settings of 3.1 and 3.2 beside their scaling factor; megatron-core 0.16.1 knows no others."""


def shape(config: HfConfig) -> ModelShape:
    """Return the shape that a Llama configuration describes."""
    if config.rope_type != "llama3":
        return _decoder.shape(config)
    rope = config.rope
    config.require(
        *((f"rope {name}", rope.positive(name, value), value) for name, value in ROPE.items())
    )
    return _decoder.shape(config, rope_scaling_factor=rope.positive("factor"))


def parameters(shape: ModelShape) -> tuple[Parameter, ...]:
    """Return the parameter map of a Llama model."""
    return (*_decoder.ends(shape), *_decoder.attention(shape), *_decoder.mlp(shape))


def extra_states(shape: ModelShape) -> tuple[ExtraState, ...]:
    """Return the extra states of a Llama model."""
    return _decoder.extra_states(shape)
