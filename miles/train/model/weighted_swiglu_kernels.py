"""The kernels of `weighted_swiglu`, in Triton: one pass over the memory each way.

Import this only where Triton is. A program computes one row, in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


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


def forward(gate_and_up: Tensor, weights: Tensor) -> Tensor:
    """Return silu(gate) * up * weight, [rows, size]."""
    num_rows, size = len(gate_and_up), gate_and_up.shape[1] // 2
    product = gate_and_up.new_empty(num_rows, size)
    block = triton.next_power_of_2(size)
    _weighted_swiglu_forward[(num_rows,)](
        gate_and_up.contiguous(), weights.contiguous(), product, size, BLOCK=block
    )
    return product


def backward(gate_and_up: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `forward`'s arguments."""
    size = gate_and_up.shape[1] // 2
    gate_and_up, weights, grad = gate_and_up.contiguous(), weights.contiguous(), grad.contiguous()
    grad_inputs, grad_weights = torch.empty_like(gate_and_up), torch.empty_like(weights)
    block = triton.next_power_of_2(size)
    _weighted_swiglu_backward[(len(gate_and_up),)](
        gate_and_up, weights, grad, grad_inputs, grad_weights, size, BLOCK=block
    )
    return grad_inputs, grad_weights
