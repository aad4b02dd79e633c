"""Elementwise work in one kernel each, where such kernels are, and in plain torch elsewhere.

    silu_mul   silu(gate) * up
    rope       a rotation of pairs by the angle of their position

On a GPU these are limited by memory: what a step pays for is each pass over a tensor. The kernels
are those of liger-kernel, in Triton, which needs no compiler of CUDA. On a CPU, and on a GPU where
they are not installed or do not run, plain torch computes the same. Norms are torch's own kernel,
but for those of `heads`; docs/decisions/025-kernels.md has the choice and the figures.

None of them writes into its input or into a gradient that it is given: Megatron holds on to some of
these tensors (a residual, the inputs of a part that is recomputed).
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.train.model import triton_kernels


@dataclass(frozen=True)
class _FusedKernels:
    """The autograd functions of liger-kernel that are called here."""

    silu_mul: Any
    rope: Any


def silu_mul(gate_and_up: Tensor) -> Tensor:
    """Return silu(gate) * up, of which the input alone is kept for the backward pass.

    Args:
        gate_and_up: [..., 2 x size], the gate in the first half.

    Returns:
        [..., size]
    """
    if (kernels := _kernels_for(gate_and_up)) is not None:
        return fused_silu_mul(kernels, gate_and_up)
    product: Tensor = _SiluMul.apply(gate_and_up)
    return product


def rope(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, is_fused: bool = True
) -> tuple[Tensor, Tensor]:
    """Rotate the query and the key of each token by the angles of its position.

    Element i of a head is paired with element i + size / 2, as in Hugging Face's models.

    Args:
        query: [tokens, heads, size].
        key: [tokens, groups, size].
        cos: [tokens, size], the second half equal to the first; so is `sin`. In float32 the
            rotation is computed in float32; in the type of `query`, it is rounded to it in between.
        is_fused: take the fused kernel where it is.
    """
    if is_fused and (kernels := _kernels_for(query)) is not None:
        return fused_rope(kernels, query, key, cos, sin)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


# --- plain torch


class _SiluMul(torch.autograd.Function):
    """silu(gate) * up. Autograd's own way would keep silu(gate) too."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)

        grads = torch.empty_like(gate_and_up)
        grad_gate, grad_up = grads.chunk(2, dim=-1)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        torch.mul(grad, F.silu(gate), out=grad_up)
        return grads


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads, [tokens, heads, size], rotated by each token's angles."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (heads * cos[:, None] + turned * sin[:, None]).to(heads.dtype)


# --- liger-kernel


def fused_silu_mul(kernels: _FusedKernels, gate_and_up: Tensor) -> Tensor:
    """Return `silu_mul` by liger's kernels for both halves in one tensor, which copy neither.

    They get rows: liger-kernel 0.8.5 returns the gradient of [tokens, 1, size] without the 1, and
    autograd refuses it ("returned an invalid gradient at index 0").
    """
    rows = gate_and_up.reshape(-1, gate_and_up.shape[-1])
    product: Tensor = kernels.silu_mul.apply(rows)
    return product.view(*gate_and_up.shape[:-1], -1)


def fused_rope(
    kernels: _FusedKernels, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `rope` by liger's kernel, which rotates in place and takes [1, heads, tokens, size].

    So it gets copies. Without, selective recomputation would rotate twice: it keeps query and key
    as they are before, and runs this function again.
    """
    rotated = kernels.rope.apply(
        query.clone(memory_format=torch.contiguous_format).transpose(0, 1)[None],
        key.clone(memory_format=torch.contiguous_format).transpose(0, 1)[None],
        cos[None],
        sin[None],
    )
    rotated_query, rotated_key = (heads[0].transpose(0, 1) for heads in rotated)
    return rotated_query, rotated_key


def has_fused_kernels(tensor: Tensor) -> bool:
    """Return whether our own kernels for experts take a tensor: on a GPU where Triton runs.

    liger-kernel has no part in them.
    """
    return triton_kernels.can_take(tensor) and _runs_triton()


def _runs_triton() -> bool:
    """Return whether the kernels for experts run on this GPU."""
    without = "SwiGLU of experts and the sums of their outputs and gradients take several passes"
    return triton_kernels.load("expert_kernels", _try_expert_kernels, without) is not None


def _try_expert_kernels(kernels: ModuleType) -> None:
    row = torch.ones(1, 16, device="cuda")
    kernels.weighted_swiglu(row, row[:, 0])


def _kernels_for(tensor: Tensor) -> _FusedKernels | None:
    """Return the fused kernels where they can take a tensor."""
    if not tensor.is_cuda or tensor.numel() == 0:
        return None
    return _kernels_on_gpu()


@functools.cache
def _kernels_on_gpu() -> _FusedKernels | None:
    """Return the fused kernels that run on this GPU. Warns once where there are none."""
    if importlib.util.find_spec("liger_kernel") is None:
        warnings.warn(
            "SwiGLU and rotary embeddings run as several kernels each: liger-kernel is not "
            "installed; pip install 'miles[gpu]' makes a step faster",
            stacklevel=2,
        )
        return None

    kernels = load_kernels()
    try:
        fused_silu_mul(kernels, torch.ones(1, 16, device="cuda"))
        torch.cuda.synchronize()
    except Exception as error:
        # Triton builds its launcher with the machine's C compiler, which may be missing.
        warnings.warn(
            "SwiGLU and rotary embeddings run as several kernels each: those of "
            f"liger-kernel do not run here ({type(error).__name__}: {error})",
            stacklevel=2,
        )
        return None
    return kernels


@functools.cache
def load_kernels() -> _FusedKernels:
    """Import liger-kernel's functions. Takes seconds."""
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return _FusedKernels(
        silu_mul=LigerFusedGateUpSiLUMulFunction,
        rope=LigerRopeFunction,
    )
