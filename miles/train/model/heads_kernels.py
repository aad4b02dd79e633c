"""The kernels of `heads`, in Triton: what it says, in one pass over the memory each way.

Import this only where Triton is. A program has a token and some of its groups, and computes in
float32; the second kernel takes some tokens after one another, to add up the norms' gradients. The
arguments have no annotations, because Triton evaluates annotations, and knows its own types only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from miles.train.model.rotary import Rotation

_ROWS = 32
"""Heads that a program has, of query, key and value: at most. With 32 of size 128, the second kernel
takes 99 registers of a thread, so that two programs fit on a processor of an H100 at a time.
"""
_TOKENS = 16
"""Tokens that a program of the second kernel takes."""
_NUM_WARPS = 8


class Heads(torch.autograd.Function):
    """`heads.split_heads`. It keeps its input, and that only where there are norms."""

    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        query_weight: Tensor | None,
        key_weight: Tensor | None,
        rotation: Rotation,
        eps: float,
        num_groups: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mixed = mixed.contiguous()
        cos, sin = rotation.cos, rotation.sin
        size = cos.shape[-1]
        num_tokens, heads_of_group = len(mixed), mixed.shape[-1] // size // num_groups
        query = mixed.new_empty(num_tokens, num_groups * (heads_of_group - 2), size)
        key, value = (mixed.new_empty(num_tokens, num_groups, size) for _ in range(2))

        sizes = _sizes(num_groups, heads_of_group, size)
        _split_heads[(num_tokens, sizes["num_parts"])](
            mixed,
            query,
            key,
            value,
            *_weights(query_weight, key_weight, cos),
            cos,
            sin,
            eps,
            has_norm=query_weight is not None,
            num_warps=_NUM_WARPS,
            **sizes,
        )

        kept = None if query_weight is None else mixed
        ctx.save_for_backward(kept, query_weight, key_weight, cos, sin)
        ctx.eps, ctx.sizes, ctx.shape = eps, sizes, mixed.shape
        return query, key, value

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor
    ) -> tuple[Tensor | None, ...]:
        mixed, query_weight, key_weight, cos, sin = ctx.saved_tensors
        num_tokens, num_parts = ctx.shape[0], ctx.sizes["num_parts"]
        grad_mixed = grad_query.new_empty(ctx.shape)
        num_programs = triton.cdiv(num_tokens, _TOKENS)
        has_norm = query_weight is not None
        rows = num_programs * num_parts if has_norm else 1
        grad_weights = cos.new_empty(rows, 2, ctx.sizes["size"], dtype=torch.float32)

        _join_gradients[(num_programs, num_parts)](
            grad_query.contiguous(),
            grad_key.contiguous(),
            grad_value.contiguous(),
            grad_mixed if mixed is None else mixed,
            *_weights(query_weight, key_weight, cos),
            cos,
            sin,
            grad_mixed,
            grad_weights,
            num_tokens,
            ctx.eps,
            has_norm=has_norm,
            num_tokens_of_program=_TOKENS,
            num_warps=_NUM_WARPS,
            **ctx.sizes,
        )
        if not any(ctx.needs_input_grad[1:3]):
            return grad_mixed, None, None, None, None, None
        of_query, of_key = grad_weights.sum(0).to(query_weight.dtype)
        return grad_mixed, of_query, of_key, None, None, None


def _sizes(num_groups: int, heads_of_group: int, size: int) -> dict[str, int]:
    """Return the sizes that the kernels are compiled for."""
    num_parts = triton.cdiv(num_groups, max(1, _ROWS // heads_of_group))
    num_groups_of_part = triton.cdiv(num_groups, num_parts)
    return {
        "num_groups": num_groups,
        "heads_of_group": heads_of_group,
        "size": size,
        "num_groups_of_part": num_groups_of_part,
        "num_parts": triton.cdiv(num_groups, num_groups_of_part),
        "num_rows": triton.next_power_of_2(num_groups_of_part * heads_of_group),
    }


def _weights(query: Tensor | None, key: Tensor | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norms' weights; where there are none, a tensor that is not read."""
    if query is None or key is None:
        return unused, unused
    return query, key


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    num_groups: tl.constexpr,
    heads_of_group: tl.constexpr,
    num_groups_of_part: tl.constexpr,
    num_rows: tl.constexpr,
):
    """Return the group of each row, its place there, [rows] each, and whether it is one, [rows, 1].

    The last two heads of a group are its key and its value.
    """
    row = tl.arange(0, num_rows)
    group = tl.program_id(1) * num_groups_of_part + row // heads_of_group
    is_there = (row < num_groups_of_part * heads_of_group) & (group < num_groups)
    return group, row % heads_of_group, is_there[:, None]


@triton.jit
def _store_halves(tensor, offset, half: tl.constexpr, first, second, is_there):  # type: ignore[no-untyped-def]
    tl.store(tensor + offset, first, is_there)
    tl.store(tensor + offset + half, second, is_there)


@triton.jit
def _load_halves(tensor, offset, half: tl.constexpr, is_there):  # type: ignore[no-untyped-def]
    """Return both halves of heads, float32 [rows, half] each."""
    first = tl.load(tensor + offset, is_there, other=0.0).to(tl.float32)
    second = tl.load(tensor + offset + half, is_there, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _load_weights(query_weight, key_weight, for_query, half: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return both halves of each row's norm: a query's, or else a key's."""
    column = tl.arange(0, half)
    query_first, query_second = _load_halves(query_weight, column, half, column < half)
    key_first, key_second = _load_halves(key_weight, column, half, column < half)
    first = tl.where(for_query, query_first[None, :], key_first[None, :])
    second = tl.where(for_query, query_second[None, :], key_second[None, :])
    return first, second


@triton.jit
def _scale(first, second, size: tl.constexpr, eps):  # type: ignore[no-untyped-def]
    """Return 1 / the root mean square of each row, [rows, 1]."""
    mean = tl.sum(first * first + second * second, 1) / size
    return (1.0 / tl.sqrt(mean + eps))[:, None]


@triton.jit
def _split_heads(  # type: ignore[no-untyped-def]
    mixed,
    query,
    key,
    value,
    query_weight,
    key_weight,
    cos,
    sin,
    eps,
    has_norm: tl.constexpr,
    num_groups: tl.constexpr,
    heads_of_group: tl.constexpr,
    size: tl.constexpr,
    num_groups_of_part: tl.constexpr,
    num_parts: tl.constexpr,
    num_rows: tl.constexpr,
):
    """Write the query, key and value of a token's groups."""
    half: tl.constexpr = size // 2
    num_queries: tl.constexpr = heads_of_group - 2
    column = tl.arange(0, half)
    group, slot, is_there = _rows(num_groups, heads_of_group, num_groups_of_part, num_rows)
    for_query = (slot < num_queries)[:, None]
    for_key = (slot == num_queries)[:, None]
    for_value = (slot == num_queries + 1)[:, None]

    token = tl.program_id(0).to(tl.int64)
    token_group = token * num_groups + group
    offset = (token_group * heads_of_group + slot)[:, None] * size + column[None, :]
    first, second = _load_halves(mixed, offset, half, is_there)
    normed_first = first
    normed_second = second
    if has_norm:
        first_weight, second_weight = _load_weights(query_weight, key_weight, for_query, half)
        scale = _scale(first, second, size, eps)
        normed_first = first * scale * first_weight
        normed_second = second * scale * second_weight

    cosine = tl.load(cos + token * size + column)[None, :]
    sine = tl.load(sin + token * size + column)[None, :]
    turned_first = normed_first * cosine - normed_second * sine
    turned_second = normed_second * cosine + normed_first * sine

    offset = (token_group * num_queries + slot)[:, None] * size + column[None, :]
    _store_halves(query, offset, half, turned_first, turned_second, is_there & for_query)
    offset = token_group[:, None] * size + column[None, :]
    _store_halves(key, offset, half, turned_first, turned_second, is_there & for_key)
    _store_halves(value, offset, half, first, second, is_there & for_value)


# Not compiled anew for another number of tokens.
@triton.jit(do_not_specialize=["num_tokens"])
def _join_gradients(  # type: ignore[no-untyped-def]
    grad_query,
    grad_key,
    grad_value,
    mixed,
    query_weight,
    key_weight,
    cos,
    sin,
    grad_mixed,
    grad_weights,
    num_tokens,
    eps,
    has_norm: tl.constexpr,
    num_tokens_of_program: tl.constexpr,
    num_groups: tl.constexpr,
    heads_of_group: tl.constexpr,
    size: tl.constexpr,
    num_groups_of_part: tl.constexpr,
    num_parts: tl.constexpr,
    num_rows: tl.constexpr,
):
    """Write the gradient of some tokens' groups, and their share of the norms' gradients."""
    half: tl.constexpr = size // 2
    num_queries: tl.constexpr = heads_of_group - 2
    column = tl.arange(0, half)
    group, slot, is_in_part = _rows(num_groups, heads_of_group, num_groups_of_part, num_rows)
    for_query = (slot < num_queries)[:, None]
    for_key = (slot == num_queries)[:, None]
    for_value = (slot == num_queries + 1)[:, None]
    if has_norm:
        first_weight, second_weight = _load_weights(query_weight, key_weight, for_query, half)
    first_sum = tl.zeros((num_rows, half), tl.float32)
    second_sum = tl.zeros((num_rows, half), tl.float32)

    for index in range(num_tokens_of_program):
        token = tl.program_id(0).to(tl.int64) * num_tokens_of_program + index
        is_there = is_in_part & (token < num_tokens)
        token_group = token * num_groups + group

        # Each row has a gradient in one of the three.
        offset = (token_group * num_queries + slot)[:, None] * size + column[None, :]
        first, second = _load_halves(grad_query, offset, half, is_there & for_query)
        offset = token_group[:, None] * size + column[None, :]
        key_first, key_second = _load_halves(grad_key, offset, half, is_there & for_key)
        value_first, value_second = _load_halves(grad_value, offset, half, is_there & for_value)

        cosine = tl.load(cos + token * size + column, token < num_tokens, other=0.0)[None, :]
        sine = tl.load(sin + token * size + column, token < num_tokens, other=0.0)[None, :]
        turned_first = (first + key_first) * cosine + (second + key_second) * sine
        turned_second = (second + key_second) * cosine - (first + key_first) * sine

        offset = (token_group * heads_of_group + slot)[:, None] * size + column[None, :]
        if has_norm:
            normed_first, normed_second = _load_halves(mixed, offset, half, is_there)
            scale = _scale(normed_first, normed_second, size, eps)
            normed_first *= scale
            normed_second *= scale

            first_product = turned_first * normed_first
            second_product = turned_second * normed_second
            first_sum += first_product
            second_sum += second_product
            along = first_product * first_weight + second_product * second_weight
            along = (tl.sum(along, 1) / size)[:, None]
            turned_first = scale * (turned_first * first_weight - normed_first * along)
            turned_second = scale * (turned_second * second_weight - normed_second * along)

        turned_first = tl.where(for_value, value_first, turned_first)
        turned_second = tl.where(for_value, value_second, turned_second)
        _store_halves(grad_mixed, offset, half, turned_first, turned_second, is_there)

    if has_norm:
        place = grad_weights + (tl.program_id(0) * num_parts + tl.program_id(1)) * 2 * size
        first = tl.sum(tl.where(for_query, first_sum, 0.0), 0)
        second = tl.sum(tl.where(for_query, second_sum, 0.0), 0)
        _store_halves(place, column, half, first, second, column < half)
        first = tl.sum(tl.where(for_key, first_sum, 0.0), 0)
        second = tl.sum(tl.where(for_key, second_sum, 0.0), 0)
        _store_halves(place + size, column, half, first, second, column < half)
