"""Rotary embeddings of packed tokens, against Megatron's and transformers'."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from miles.architecture.config import ModelShape
from miles.train.model import kernels, process_groups
from miles.train.model.rotary import RotaryFrequencies, Rotation
from miles.train.parallel_layout import Layout
from tests.support.ranks import SHAPE, start

LENGTHS = (1, 5, 1, 1, 300, 2, 77)
HEAD_SIZE = 64
EIGHT_TIMES = replace(SHAPE, kv_channels=HEAD_SIZE, rotary_base=5e5, rope_scaling_factor=8.0)


@pytest.fixture(scope="module", autouse=True)
def rank(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Join a group of one rank: Megatron's embedding asks for its groups."""
    start(Layout(1), 0, tmp_path_factory.mktemp("rank") / "meeting")
    yield
    process_groups.shutdown()


def megatron_embedding(shape: ModelShape) -> Any:
    from megatron.core.models.common.embeddings import RotaryEmbedding

    return RotaryEmbedding(
        shape.kv_channels,
        rotary_percent=1.0,
        rotary_base=int(shape.rotary_base),
        rope_scaling=shape.rope_scaling_factor is not None,
        rope_scaling_factor=shape.rope_scaling_factor or 1.0,
        use_cpu_initialization=True,
    )


def megatron_rotation(heads: torch.Tensor, embedding: Any) -> torch.Tensor:
    """Return heads, [tokens, heads, size], as Megatron rotates them: one segment at a time."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd

    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    group = parallel_state.get_context_parallel_group()
    rotated: torch.Tensor = _apply_rotary_pos_emb_thd(
        heads, cu_seqlens, embedding(max(LENGTHS)), cp_group=group
    )
    return rotated


def position_ids() -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in LENGTHS])[None]


def heads(num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_heads)
    values = torch.randn(sum(LENGTHS), num_heads, HEAD_SIZE, generator=generator)
    return values.to(dtype).requires_grad_()


def rotate(query: torch.Tensor, key: torch.Tensor, rotation: Rotation) -> Any:
    return kernels.rope(query, key, rotation.cos, rotation.sin)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_all_tokens_at_once_are_rotated_as_segment_by_segment(dtype: torch.dtype) -> None:
    embedding = megatron_embedding(EIGHT_TIMES)
    embedding.inv_freq = embedding.inv_freq.to(dtype)
    rotation = RotaryFrequencies(embedding.inv_freq).rotation(position_ids())
    query, key = heads(4, dtype), heads(2, dtype)

    rotated_query, rotated_key = rotate(query, key, rotation)
    (rotated_query.square().sum() + rotated_key.pow(3).sum()).backward()

    for rotated, plain, power in ((rotated_query, query, 2), (rotated_key, key, 3)):
        theirs = plain.detach().clone().requires_grad_()
        expected = megatron_rotation(theirs, embedding)
        expected.pow(power).sum().backward()
        # The same products of the same numbers.
        assert torch.equal(rotated, expected)
        torch.testing.assert_close(plain.grad, theirs.grad)


def test_bfloat16_is_nearer_to_float64_than_megatron() -> None:
    embedding = megatron_embedding(EIGHT_TIMES)
    exact = RotaryFrequencies(embedding.inv_freq.double()).rotation(position_ids())
    rotation = RotaryFrequencies.of(EIGHT_TIMES).rotation(position_ids())
    query, key = heads(4, torch.bfloat16), heads(2, torch.bfloat16)

    expected, _ = rotate(query.double(), key.double(), exact)
    ours, _ = rotate(query, key, rotation)
    megatrons = megatron_rotation(query, embedding)

    assert ours.dtype == torch.bfloat16
    our_error = (ours.double() - expected).pow(2).mean().sqrt()
    their_error = (megatrons.double() - expected).pow(2).mean().sqrt()
    assert our_error < 0.75 * their_error


LLAMAS = {
    "3.1 8B": (128, 8.0, 131072),
    "3.2 1B": (64, 32.0, 131072),
    "3.2 3B": (128, 32.0, 131072),
}


@pytest.mark.parametrize("name", LLAMAS)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    head_size, factor, longest = LLAMAS[name]
    shape = replace(
        SHAPE,
        kv_channels=head_size,
        rotary_base=5e5,
        rope_scaling_factor=factor,
        max_position_embeddings=longest,
    )
    config = LlamaConfig(
        hidden_size=4 * head_size,
        num_attention_heads=4,
        head_dim=head_size,
        max_position_embeddings=longest,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    positions = torch.tensor([[0, 1, 2, 8191, 8192, longest - 1]])

    rotation = RotaryFrequencies.of(shape).rotation(positions)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)

    # At the last position an angle of 131,071 is known to 0.008 only, in either.
    bounds = torch.tensor([1e-6, 1e-6, 1e-6, 2e-3, 2e-3, 2e-2])[:, None]
    assert ((rotation.cos - cos[0]).abs() <= bounds).all()
    assert ((rotation.sin - sin[0]).abs() <= bounds).all()


def test_plain_frequencies_are_those_of_transformers() -> None:
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config = Qwen3Config(
        head_dim=SHAPE.kv_channels,
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE.rotary_base},
    )
    positions = torch.tensor([[0, 1, 2, 40959]])

    rotation = RotaryFrequencies.of(SHAPE).rotation(positions)
    cos, sin = Qwen3RotaryEmbedding(config)(torch.zeros(1), positions)
    torch.testing.assert_close(rotation.cos, cos[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(rotation.sin, sin[0], rtol=0, atol=1e-6)
