"""Llama 3, 3.1 and 3.2: grouped queries, gated MLP, tied embeddings in the small ones. That 3.1 and 3.2 scale their
rotary frequencies is a matter of the configuration: no parameter holds it."""

from __future__ import annotations

from miles.architecture.config import HfConfig, ModelShape
from miles.architecture.families import Parameter, _decoder

ARCHITECTURE = "LlamaForCausalLM"

ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What 3.1 and 3.2 set beside their scaling factor; megatron-core 0.16.1 knows no other values."""


def shape(config: HfConfig) -> ModelShape:
    """The shape that a Llama configuration describes."""
    if config.rope_type != "llama3":
        return _decoder.shape(config)
    rope = config.rope
    config.require(
        *((f"rope {name}", float(rope.get(name, value)), value) for name, value in ROPE.items())
    )
    return _decoder.shape(config, rope_scaling_factor=float(rope["factor"]))


def parameters(shape: ModelShape) -> tuple[Parameter, ...]:
    """The parameter map of a Llama model."""
    return (*_decoder.ends(shape), *_decoder.attention(shape), *_decoder.mlp(shape))
