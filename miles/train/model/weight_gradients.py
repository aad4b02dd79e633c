"""Gradients of Megatron's linear layers, added to the float32 sum by the matrix product itself.

    main_grad += grad_output^T @ input        float32 += bfloat16 @ bfloat16

Otherwise each micro-batch computes the gradient in the model's precision, which rounds it, writes
it, and adds it in another pass. `gradient_accumulation_fusion` is Megatron's name for this, and its
linear layers, its hooks of the backward pass and its tied embedding know how to live with it; only
the product is an extension of Apex, `fused_weight_gradient_mlp_cuda`. torch has that product too,
so this module takes the extension's place where it is not installed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles.train.model import device


def install() -> None:
    """Give Megatron's linear layers the product where they would miss Apex's. Call it any time.

    megatron-core 0.16.1 asks for the extension when `tensor_parallel.layers` is imported, and
    refuses `gradient_accumulation_fusion` without (RuntimeError in ColumnParallelLinear).
    """
    from megatron.core.tensor_parallel import layers

    has_extension = layers._grad_accum_fusion_available and device.has_gpu()
    if not has_extension:
        layers.fused_weight_gradient_mlp_cuda = _Extension
        layers._grad_accum_fusion_available = True


class _Extension:
    """The part of the extension that Megatron calls where gradients are summed in float32."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        accumulate(inputs, grad_output, main_grad)


def accumulate(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """Add the gradient of a weight to `main_grad`, in place. The sums are in float32.

    Args:
        inputs: [tokens, in], of the linear layer.
        grad_output: [tokens, out], of the same type.
        main_grad: float32 [out, in].
    """
    if inputs.shape[0] == 0:  # an expert without tokens
        return
    if inputs.dtype == main_grad.dtype:
        main_grad.addmm_(grad_output.t(), inputs)
    elif inputs.is_cuda:
        torch.addmm(main_grad, grad_output.t(), inputs, out_dtype=main_grad.dtype, out=main_grad)
    else:  # torch has that product for CUDA only
        main_grad.addmm_(grad_output.t().to(main_grad.dtype), inputs.to(main_grad.dtype))
