"""SwiGLU of the tokens of experts, times the router's weight of each token.

The weight comes before the expert's last product, where a row is narrowest, as in Megatron.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.train.model.kernels import has_fused_kernels


def weighted_swiglu(gate_and_up: Tensor, weights: Tensor, *, is_fused: bool = True) -> Tensor:
    """Return silu(gate) * up * weight, [rows, size]. Only the arguments are kept for the backward.

    Args:
        gate_and_up: [rows, 2 x size], the gate in the first half.
        weights: float32 [rows]
        is_fused: take the fused kernel where it is.
    """
    if is_fused and has_fused_kernels(gate_and_up):
        fused: Tensor = _FusedWeightedSwiGLU.apply(gate_and_up, weights)
        return fused
    product: Tensor = _WeightedSwiGLU.apply(gate_and_up, weights)
    return product


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up, weights)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return _scale(F.silu(gate) * up, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate_and_up, weights = ctx.saved_tensors
        grad, scaled = grads[0], _scale(grads[0], weights)
        gate, up = gate_and_up.chunk(2, dim=-1)
        activated = F.silu(gate)

        grad_inputs = torch.empty_like(gate_and_up)
        grad_gate, grad_up = grad_inputs.chunk(2, dim=-1)
        grad_gate.copy_(torch.ops.aten.silu_backward(scaled * up, gate))
        torch.mul(scaled, activated, out=grad_up)
        grad_weights = (activated.mul_(up).to(weights.dtype) * grad).sum(-1)
        return grad_inputs, grad_weights


class _FusedWeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor, weights: Tensor) -> Tensor:
        from miles.train.model import expert_kernels

        ctx.save_for_backward(gate_and_up, weights)
        return expert_kernels.weighted_swiglu(gate_and_up, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        from miles.train.model import expert_kernels

        gate_and_up, weights = ctx.saved_tensors
        return expert_kernels.weighted_swiglu_grads(gate_and_up, weights, grads[0])


def _scale(rows: Tensor, weights: Tensor) -> Tensor:
    """Return each row times its weight, rounded once to the rows' type."""
    return torch.mul(rows, weights[:, None], out=torch.empty_like(rows))
