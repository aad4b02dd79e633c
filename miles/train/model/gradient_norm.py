"""The gradient's norm, and its clipping, over the tensors of a rank at once.

Which tensors count on which rank, and over which ranks they are summed, is Megatron's affair. This
replaces the two functions that it calls on the list of them where neither Apex nor Transformer
Engine is installed: in megatron-core 0.16.1 these take a kernel and a question to the GPU for each
tensor (`torch.tensor` of a list of numbers that are on the GPU), and a copy for each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def install() -> None:
    """Replace Megatron's two functions by those of this module. Call it any time."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm
    if clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = scale


def l2_norm(
    chunk_size: int, noop_flag: Any, tensor_lists: Sequence[Sequence[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """Return the norm of all tensors end to end, [1], without waiting for it.

    The arguments are those of Apex's function; only the tensors matter.
    """
    (tensors,) = tensor_lists
    norm = torch.nn.utils.get_total_norm(tensors, foreach=True)
    return norm.reshape(1), None


def scale(
    chunk_size: int, noop_flag: Any, tensor_lists: Sequence[Sequence[Tensor]], factor: float
) -> None:
    """Write the first list, times the factor, into the second one. Megatron gives one list twice.

    The arguments are those of Apex's function.
    """
    sources, targets = tensor_lists
    if sources is not targets:
        torch._foreach_copy_(targets, sources)
    torch._foreach_mul_(targets, factor)
