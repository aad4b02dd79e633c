"""From the product of a layer's weights for query, key and value to what attention takes.

    mixed  [tokens, groups x (heads of a group + 2) x size]   q q k v | q q k v
        ->  query [tokens, heads, size]   key, value [tokens, groups, size]

A head of query or key is normed, in models that do so, and rotated by its token's position. On a
GPU all of it is one kernel each way, in Triton (`heads_kernels`): one read and one write, where
split, norms and rotation take some ten passes. Elsewhere plain torch does the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.train.model import triton_kernels
from miles.train.model.kernels import rope
from miles.train.model.rotary import Rotation


@dataclass(frozen=True)
class HeadNorms:
    """The norms of the heads of query and key."""

    query_weight: Tensor
    """[size]"""
    key_weight: Tensor
    """[size]"""
    eps: float


def split_heads(
    mixed: Tensor, rotation: Rotation, norms: HeadNorms | None, num_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value, ready for attention.

    Args:
        mixed: [tokens, groups x (heads of a group + 2) x size].
        norms: None in models that do not norm their heads.
        num_groups: groups of this rank.
    """
    kernels = _kernels_for(mixed, rotation.cos.shape[-1])
    if kernels is None:
        return plain_heads(mixed, rotation, norms, num_groups)
    return fused_heads(kernels, mixed, rotation, norms, num_groups)


def plain_heads(
    mixed: Tensor, rotation: Rotation, norms: HeadNorms | None, num_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `split_heads` by plain torch: the definition of what the kernels compute."""
    size = rotation.cos.shape[-1]
    by_group = mixed.view(len(mixed), num_groups, -1, size)
    query, key, value = by_group.split((by_group.shape[2] - 2, 1, 1), dim=2)
    query, key, value = query.flatten(1, 2), key.squeeze(2), value.squeeze(2)
    if norms is not None:
        query = F.rms_norm(query, (size,), norms.query_weight, norms.eps)
        key = F.rms_norm(key, (size,), norms.key_weight, norms.eps)
    query, key = rope(query, key, rotation.cos, rotation.sin, is_fused=False)
    return query, key, value


def fused_heads(
    kernels: ModuleType,
    mixed: Tensor,
    rotation: Rotation,
    norms: HeadNorms | None,
    num_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `split_heads` by the kernels."""
    query_weight = key_weight = None
    eps = 0.0
    if norms is not None:
        query_weight, key_weight, eps = norms.query_weight, norms.key_weight, norms.eps
    query, key, value = kernels.Heads.apply(
        mixed, query_weight, key_weight, rotation, eps, num_groups
    )
    return query, key, value


def _kernels_for(mixed: Tensor, size: int) -> ModuleType | None:
    """Return the module of the kernels where they can take this product."""
    is_power_of_two = size & (size - 1) == 0
    if not is_power_of_two or not triton_kernels.can_take(mixed):
        return None
    without = "query, key and value are split, normed and rotated in some ten passes"
    return triton_kernels.load("heads_kernels", _try_kernels, without)


def _try_kernels(kernels: ModuleType) -> None:
    cos = torch.ones(1, 16, device="cuda")
    fused_heads(kernels, cos.repeat(1, 3), Rotation(cos, cos), None, 1)
