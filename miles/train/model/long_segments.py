"""Attention of long segments by cuDNN, one segment at a time, on Hopper GPUs and later ones.

    lengths 300 9,000 700      300 and 700 end to end  ->  torch's kernel for packed sequences
                               9,000, padded to 9,216  ->  cuDNN's for one sequence

On an H100, torch's FlashAttention 2 reaches 310 TFLOP/s and cuDNN 534. But cuDNN makes a plan for
each length, which takes a tenth of a second. So a segment is padded, by less than a sixteenth, to
one of a few lengths. No token sees a later one: the padding at the end changes nothing.
"""

from __future__ import annotations

import functools
import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

LONG_TOKENS = 4096
"""Segments above it go to cuDNN. Below, a plan and a launch for each cost more than they save."""

_HOPPER = 9
_LARGEST_HEAD = 128


def is_long(length: int) -> bool:
    """Return whether a segment of so many tokens goes to cuDNN, where there is one."""
    return length > LONG_TOKENS


def padded_length(length: int) -> int:
    """Return the length that a long segment is padded to: one of 16 between powers of two."""
    step = max(1, 2 ** (math.ceil(math.log2(length)) - 1) // 16)
    return -(-length // step) * step


def attention_of_one(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return causal attention within one sequence, [tokens, heads, head size], by cuDNN.

    Args:
        query: [tokens, heads, head size]; key and value may have fewer heads.
    """
    num_tokens = query.shape[0]
    padding = padded_length(num_tokens) - num_tokens

    # torch wants [batch, heads, tokens, head size], and cuDNN the tokens outermost in memory
    query, key, value = (
        F.pad(heads, (0, 0, 0, 0, 0, padding)).transpose(0, 1)[None]
        for heads in (query, key, value)
    )
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
    return out[0].transpose(0, 1)[:num_tokens]


def is_usable(query: Tensor, key: Tensor) -> bool:
    """Return whether cuDNN takes tensors like these on this GPU, and computes what it should.

    Args:
        query: [tokens, heads, head size]
        key: [tokens, groups, head size]
    """
    # Its backward pass is not deterministic.
    if torch.are_deterministic_algorithms_enabled() or query.shape[-1] > _LARGEST_HEAD:
        return False
    return _computes_well(query.shape[1], key.shape[1], query.shape[2], query.dtype)


@functools.cache
def _computes_well(num_heads: int, num_groups: int, head_size: int, dtype: torch.dtype) -> bool:
    """Return whether cuDNN agrees with the plain computation. Asks the GPU once for each shape."""
    if torch.cuda.get_device_capability()[0] < _HOPPER:
        return False

    tokens = 201  # not one of the lengths that need no padding
    try:
        with torch.enable_grad():
            deviation = _deviation(tokens, num_heads, num_groups, head_size, dtype)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        if deviation < 0.02:
            return True
        reason = f"it deviates by {deviation:.2g}"
    warnings.warn(
        f"attention of samples above {LONG_TOKENS:,} tokens runs by torch's slower kernel, not by "
        f"cuDNN ({reason})",
        stacklevel=2,
    )
    return False


def _deviation(
    tokens: int, num_heads: int, num_groups: int, head_size: int, dtype: torch.dtype
) -> float:
    """Return the relative error of cuDNN's output and gradients, against float32."""

    def numbers(heads: int) -> Tensor:
        # Made without a random state, which belongs to the run.
        count = torch.arange(tokens * heads * head_size, dtype=torch.float32, device="cuda")
        return torch.sin(count * count).view(tokens, heads, head_size)

    def outputs_and_gradients(inputs: list[Tensor], *, by_cudnn: bool) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        scale = head_size**-0.5
        if by_cudnn:
            query, key, value = leaves
            out = attention_of_one(query, key, value, scale)
        else:
            query, key, value = (leaf.transpose(0, 1)[None] for leaf in leaves)
            with sdpa_kernel(SDPBackend.MATH):
                out = F.scaled_dot_product_attention(
                    query, key, value, is_causal=True, scale=scale, enable_gqa=True
                )[0].transpose(0, 1)
        out.backward(numbers(num_heads).to(out.dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    inputs = [numbers(num_heads).to(dtype), numbers(num_groups).to(dtype) + 0.5]
    inputs.append(numbers(num_groups).to(dtype).flip(0))
    found = outputs_and_gradients(inputs, by_cudnn=True)
    expected = outputs_and_gradients([tensor.float() for tensor in inputs], by_cudnn=False)

    errors = []
    for one, reference in zip(found, expected, strict=True):
        errors.append((one.float() - reference).norm() / reference.norm())
    return float(torch.stack(errors).max())
