"""Kernels on a GPU against plain torch in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miles.data.packing.micro_batch import micro_batch
from miles.train.model import device, long_segments
from miles.train.model.attention import PackedAttention
from miles.train.model.device_batch import send
from miles.train.model.heads import HeadNorms, plain_heads, split_heads
from miles.train.model.kernels import rope, silu_mul
from miles.train.model.rotary import Rotation
from miles.train.model.weight_gradients import accumulate

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of the difference's norm to the reference's: a few roundings."""

ATTENTION_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""The same, where probabilities are rounded too."""

dtypes = pytest.mark.parametrize("dtype", list(BOUNDS), ids=["float32", "bfloat16"])


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return random numbers on the device, of which a gradient is wanted."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = torch.randn(*shape, generator=generator)
    return values.to(device.torch_device(), dtype).requires_grad_()


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the difference's norm to the reference's; NaN where a number is none."""
    expected = expected.double().cpu()
    return float((found.double().cpu() - expected).norm() / expected.norm())


def require_same(
    function: Callable[..., Any], reference: Callable[..., Any], inputs: list[Tensor], bound: float
) -> None:
    """Compare a function with its reference in float64, on a CPU: values and gradients."""
    exact = [values.detach().double().cpu().requires_grad_() for values in inputs]
    found, expected = function(*inputs), reference(*exact)
    assert distance(found, expected) < bound

    grads = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    found.backward(grads.to(found))
    expected.backward(grads.to(found.dtype).double())
    for values, like in zip(inputs, exact, strict=True):
        assert values.grad is not None
        assert like.grad is not None
        assert distance(values.grad, like.grad) < bound


@dtypes
@pytest.mark.parametrize("has_norm", [True, False], ids=["normed", "plain"])
def test_heads_are_the_plain_ones(dtype: torch.dtype, has_norm: bool) -> None:
    angles = torch.rand(77, 64, generator=torch.Generator().manual_seed(4)) * 6
    angles = torch.cat([angles, angles], 1)

    def heads(split: Any, mixed: Tensor, *weights: Tensor) -> Tensor:
        norms = HeadNorms(weights[0], weights[1], 1e-6) if has_norm else None
        exact = torch.promote_types(mixed.dtype, torch.float32)
        turn = [function(angles).to(mixed.device, exact) for function in (torch.cos, torch.sin)]
        return torch.cat(split(mixed, Rotation(turn[0], turn[1]), norms, 8), 1)

    inputs = [draw(77, 8 * 6 * 128, dtype=dtype)]
    if has_norm:
        inputs += [draw(128, dtype=dtype, seed=seed) for seed in (1, 2)]
    require_same(partial(heads, split_heads), partial(heads, plain_heads), inputs, BOUNDS[dtype])


@dtypes
def test_swiglu_is_the_plain_one(dtype: torch.dtype) -> None:
    def reference(gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    require_same(silu_mul, reference, [draw(33, 1, 2 * 9728, dtype=dtype)], BOUNDS[dtype])


@dtypes
def test_rotation_is_the_plain_one(dtype: torch.dtype) -> None:
    angles = torch.rand(77, 64, generator=torch.Generator().manual_seed(4)) * 6
    cos, sin = (function(torch.cat([angles, angles], 1)) for function in (torch.cos, torch.sin))

    def reference(query: Tensor, key: Tensor) -> Tensor:
        def rotated(heads: Tensor) -> Tensor:
            first, second = heads.chunk(2, dim=-1)
            turned = torch.cat((-second, first), dim=-1)
            return heads * cos.double()[:, None] + turned * sin.double()[:, None]

        return torch.cat([rotated(query), rotated(key)], 1)

    def function(query: Tensor, key: Tensor) -> Tensor:
        where = query.device
        return torch.cat(rope(query, key, cos.to(where), sin.to(where)), 1)

    inputs = [draw(77, 32, 128, dtype=dtype), draw(77, 8, 128, dtype=dtype, seed=5)]
    require_same(function, reference, inputs, BOUNDS[dtype])


def packed_attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """Return attention over packed segments, by the module of the model."""
    from miles.train.model.packed_params import packed_params

    head_size = query.shape[-1]
    config: Any = SimpleNamespace(
        context_parallel_size=1, attention_dropout=0.0, kv_channels=head_size
    )
    num_tokens = sum(lengths)
    batch = micro_batch(
        np.zeros(num_tokens, np.int32),
        np.ones(num_tokens, np.uint8),
        np.array(lengths, np.int32),
        np.arange(len(lengths)),
        np.zeros(len(lengths), np.int32),
    )
    packed = packed_params(send(batch), None)
    attention = PackedAttention(config, 1, None, "self")
    return attention(query, key, value, packed_seq_params=packed)


@dtypes
@pytest.mark.parametrize("long_tokens", [4096, 100], ids=["packed", "long-ones-apart"])
@pytest.mark.parametrize(("heads", "groups", "head_size"), [(16, 8, 128), (32, 8, 64), (4, 4, 16)])
def test_packed_attention_is_masked_attention(
    dtype: torch.dtype,
    long_tokens: int,
    heads: int,
    groups: int,
    head_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(long_segments, "LONG_TOKENS", long_tokens)
    lengths = [1, 130, 7, 64, 255]
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    num_tokens = len(segment)
    allowed = (segment[:, None] == segment) & torch.ones(num_tokens, num_tokens).tril().bool()

    def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (part.repeat_interleave(heads // groups, 1) for part in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) / head_size**0.5
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value).reshape(num_tokens, -1)

    inputs = [
        draw(num_tokens, number, head_size, dtype=dtype, seed=index)
        for index, number in enumerate((heads, groups, groups))
    ]
    require_same(
        lambda query, key, value: packed_attention(query, key, value, lengths),
        reference,
        inputs,
        ATTENTION_BOUNDS[dtype],
    )


@dtypes
def test_the_gradient_of_a_weight_is_added_in_float32(dtype: torch.dtype) -> None:
    inputs, grads = (draw(300, size, dtype=dtype).detach() for size in (64, 96))
    start = draw(96, 64, dtype=torch.float32).detach() * 100
    expected = start.double() + grads.double().t() @ inputs.double()

    main_grad = start.clone()
    accumulate(inputs, grads, main_grad)
    # Rounded to bfloat16 in between, the sums would be off by some 1e-3 of the product.
    assert distance(main_grad - start, expected - start.double()) < 2e-5
