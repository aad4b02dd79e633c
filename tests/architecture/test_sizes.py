"""Counts of heads and parameters agree with each other, and with the parameter maps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from miles.architecture import sizes
from miles.architecture.config import ModelShape
from miles.architecture.families import hf_shapes

DENSE = ModelShape(
    model_type="qwen3",
    num_layers=3,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=10,
    max_position_embeddings=64,
    rotary_base=10_000.0,
    norm_epsilon=1e-6,
    tied_embeddings=True,
    qk_layernorm=True,
    add_qkv_bias=False,
)
MOE = replace(
    DENSE,
    model_type="qwen3_moe",
    tied_embeddings=False,
    num_experts=5,
    moe_router_topk=2,
    moe_ffn_hidden_size=12,
)
BIASED = replace(DENSE, model_type="qwen2", qk_layernorm=False, add_qkv_bias=True)


@pytest.mark.parametrize("shape", [DENSE, MOE, BIASED], ids=lambda shape: shape.model_type)
def test_the_map_has_as_many_parameters(shape: ModelShape) -> None:
    counts = [math.prod(sizes_of_tensor) for sizes_of_tensor in hf_shapes(shape).values()]
    assert sizes.total_parameters(shape) == sum(counts)


def test_idle_experts_are_not_active() -> None:
    assert sizes.active_parameters(DENSE) == sizes.total_parameters(DENSE)
    idle = 3 * (5 - 2) * (3 * 8 * 12)
    assert sizes.active_parameters(MOE) == sizes.total_parameters(MOE) - idle


def test_heads_and_groups() -> None:
    assert sizes.query_size(DENSE) == 24
    assert sizes.key_size(DENSE) == 8
    assert sizes.heads_per_group(DENSE) == 3


@pytest.mark.parametrize(("multiple", "rows"), [(1, 10), (5, 10), (8, 16)])
def test_the_vocabulary_is_padded_to_a_multiple(multiple: int, rows: int) -> None:
    assert sizes.padded_vocab_size(DENSE, multiple) == rows
