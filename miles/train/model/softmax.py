"""The softmax of a piece of logits, of which a rank has the columns of its part of the vocabulary.

    logits [rows, columns], the column of each row's label
        -> three numbers a row: the highest logit, the sum of exp(logit - highest), the label's logit
    the same, with such numbers of all ranks
        -> the gradient of the losses' sum, in the memory of the logits

On a GPU each of the two is one kernel, in Triton (`softmax_kernels`). Plain torch makes seven
passes over the logits, half as long as the matrix products around them. Elsewhere, and where Triton
does not run, plain torch computes the same.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from miles.train.model import triton_kernels


def row_sums(logits: Tensor, label_columns: Tensor, *, is_fused: bool = True) -> Tensor:
    """Return three numbers of each row on this rank, [3, rows], in float32 or more precisely.

    Args:
        logits: [rows, columns]
        label_columns: int64 [rows]: the label's column. Below 0, or behind the last, where another
            rank has it.
        is_fused: take the kernel where it is.

    Returns:
        the highest logit; the sum of the exponentials of the logits less that; the label's logit,
        0 where another rank has it.
    """
    if is_fused and (kernels := _kernels_for(logits)) is not None:
        sums: Tensor = kernels.row_sums(logits, label_columns)
        return sums

    columns, is_own = _own_columns(logits, label_columns)
    label_logits = logits.gather(1, columns).where(is_own, 0.0)[:, 0]
    highest = logits.amax(1)
    exponentials = logits.to(_sum_dtype(logits), copy=True).sub_(highest[:, None]).exp_()
    return torch.stack([highest, exponentials.sum(1), label_logits])


def turn_into_gradient(
    logits: Tensor,
    label_columns: Tensor,
    highest: Tensor,
    factors: Tensor,
    scale: Tensor,
    *,
    is_fused: bool = True,
) -> Tensor:
    """Return exp(logits - highest) x factors, less the scale at the label, in place of the logits.

    Args:
        logits, label_columns, is_fused: as of `row_sums`.
        highest: float32 [rows], subtracted before the exponential.
        factors: float32 [rows]: the scale / the sum of those exponentials over all ranks.
        scale: float32 scalar, to multiply the gradient by.
    """
    if is_fused and (kernels := _kernels_for(logits)) is not None:
        kernels.turn_into_gradient(logits, label_columns, highest, factors, scale)
        return logits

    columns, is_own = _own_columns(logits, label_columns)
    # In place where the logits are float32 already.
    values = logits.to(_sum_dtype(logits)).sub_(highest[:, None]).exp_()
    at_labels = values.gather(1, columns) * factors[:, None] - is_own * scale
    torch.mul(values, factors[:, None], out=logits)
    return logits.scatter_(1, columns, at_labels.to(logits.dtype))


def _own_columns(logits: Tensor, label_columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the labels' columns, [rows, 1]: int64, any where another rank has it; and whether this
    rank has it.
    """
    num_columns = logits.shape[1]
    columns = label_columns[:, None]
    return columns.clamp(0, num_columns - 1), (columns >= 0) & (columns < num_columns)


def _sum_dtype(logits: Tensor) -> torch.dtype:
    """Return the type in which logits are summed: float32, or a more precise one of their own."""
    return torch.promote_types(logits.dtype, torch.float32)


def _kernels_for(logits: Tensor) -> ModuleType | None:
    """Return the module of the kernels where they can take these logits."""
    return _kernels_on_gpu() if triton_kernels.can_take(logits) else None


def _kernels_on_gpu() -> ModuleType | None:
    """Return the module of the kernels if they run on this GPU."""
    without = "the softmax of the loss runs in seven passes"
    return triton_kernels.load("softmax_kernels", _try_kernels, without)


def _try_kernels(kernels: ModuleType) -> None:
    logits = torch.ones(1, 8, device="cuda")
    kernels.row_sums(logits, logits.new_zeros(1, dtype=torch.int64))
