"""The kernels around the experts' products, in Triton: each passes over its memory once.

    weighted_swiglu   between the two products of an expert, forward and backward
    add_up_copies     the outputs of a token's experts; and the gradients of a token's copies
    add_to_sums       the gradients of all experts' matrices to their float32 sums

Import this only where Triton is. All is computed in float32, and rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCK = 2048
"""The columns that a program adds up at most."""
_ADDED_BLOCK = 4096
"""The gradients that a program adds to their sums."""


@triton.jit
def _weighted_swiglu_forward(  # type: ignore[no-untyped-def]
    gate_and_up, weights, product, size, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < size

    start = gate_and_up + row * 2 * size + columns
    gate = tl.load(start, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(start + size, mask=is_inside, other=0.0).to(tl.float32)
    weight = tl.load(weights + row).to(tl.float32)

    values = gate * tl.sigmoid(gate) * up * weight
    tl.store(product + row * size + columns, values, mask=is_inside)


@triton.jit
def _weighted_swiglu_backward(  # type: ignore[no-untyped-def]
    gate_and_up, weights, grad_product, grad_inputs, grad_weights, size, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < size

    start = row * 2 * size + columns
    gate = tl.load(gate_and_up + start, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_and_up + start + size, mask=is_inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_product + row * size + columns, mask=is_inside, other=0.0).to(tl.float32)
    scaled = grad * tl.load(weights + row).to(tl.float32)

    sigmoid = tl.sigmoid(gate)
    activated = gate * sigmoid
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(grad_inputs + start, scaled * up * slope, mask=is_inside)
    tl.store(grad_inputs + start + size, scaled * activated, mask=is_inside)
    tl.store(grad_weights + row, tl.sum(grad * activated * up, axis=0))


@triton.jit
def _add_up_copies(  # type: ignore[no-untyped-def]
    copies, positions, sums, width, NUM_COPIES: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < width

    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for number in tl.static_range(NUM_COPIES):
        position = tl.load(positions + row * NUM_COPIES + number)
        start = copies + position * width + columns
        total += tl.load(start, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(sums + row * width + columns, total, mask=is_inside)


@triton.jit
def _add_to_sums(  # type: ignore[no-untyped-def]
    sums, grads, ends, size, step, BLOCK: tl.constexpr
):
    group = tl.program_id(1).to(tl.int64)
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    # The product's result for a group without rows is not zero everywhere (pytorch issue 172439).
    if tl.load(ends + group) > start:
        elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        is_inside = elements < size
        places = sums + group * step + elements
        grad = tl.load(grads + group * size + elements, mask=is_inside, other=0.0)
        total = tl.load(places, mask=is_inside, other=0.0) + grad.to(tl.float32)
        tl.store(places, total, mask=is_inside)


def weighted_swiglu(gate_and_up: Tensor, weights: Tensor) -> Tensor:
    """Return silu(gate) * up * weight, [rows, size]."""
    gate_and_up, weights = gate_and_up.contiguous(), weights.contiguous()
    num_rows, size = len(gate_and_up), gate_and_up.shape[1] // 2
    product = gate_and_up.new_empty(num_rows, size)
    block = triton.next_power_of_2(size)
    _weighted_swiglu_forward[(num_rows,)](gate_and_up, weights, product, size, BLOCK=block)
    return product


def weighted_swiglu_grads(
    gate_and_up: Tensor, weights: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the arguments of `weighted_swiglu`."""
    size = gate_and_up.shape[1] // 2
    gate_and_up, weights, grad = gate_and_up.contiguous(), weights.contiguous(), grad.contiguous()
    grad_inputs, grad_weights = torch.empty_like(gate_and_up), torch.empty_like(weights)
    block = triton.next_power_of_2(size)
    _weighted_swiglu_backward[(len(gate_and_up),)](
        gate_and_up, weights, grad, grad_inputs, grad_weights, size, BLOCK=block
    )
    return grad_inputs, grad_weights


def add_up_copies(copies: Tensor, positions: Tensor) -> Tensor:
    """Return the sum of the copies of each row, added in float32.

    Args:
        copies: [copies, width]
        positions: int64 [rows, copies of a row]: where they are.
    """
    copies = copies.contiguous()
    (num_rows, num_copies), width = positions.shape, copies.shape[1]
    sums = copies.new_empty(num_rows, width)
    block = min(triton.next_power_of_2(width), _MAX_BLOCK)
    grid = (num_rows, triton.cdiv(width, block))
    _add_up_copies[grid](copies, positions, sums, width, NUM_COPIES=num_copies, BLOCK=block)
    return sums


def add_to_sums(sums: Tensor, grads: Tensor, ends: Tensor) -> None:
    """Add gradients to their sums, but for groups without rows, whose gradients may be anything.

    Args:
        sums: float32 [groups, out, in], each matrix contiguous.
        grads: [groups, out, in], contiguous.
        ends: int32 [groups]: where the rows of each group end.
    """
    grads = grads.contiguous()
    size = grads[0].numel()
    grid = (triton.cdiv(size, _ADDED_BLOCK), len(grads))
    _add_to_sums[grid](sums, grads, ends, size, sums.stride(0), BLOCK=_ADDED_BLOCK, num_warps=8)
