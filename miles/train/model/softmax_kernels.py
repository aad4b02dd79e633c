"""The kernels of `softmax`, in Triton: what it says, in one pass over the logits each.

They compute in float32, from logits in float32, bfloat16 or float16. Their arguments have no
annotations, because Triton evaluates annotations, and knows its own types only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS_OF_SUM = 8192
"""Columns of a row that a program of the first kernel reads at a time."""
_COLUMNS_OF_GRADIENT = 4096
"""Columns of a row that a program of the second kernel has."""
_NUM_WARPS = 8


def row_sums(logits: Tensor, label_columns: Tensor) -> Tensor:
    """Return `softmax.row_sums`, float32 [3, rows]."""
    num_rows, num_columns = logits.shape
    assert logits.is_contiguous()
    sums = torch.empty(3, num_rows, dtype=torch.float32, device=logits.device)
    _sum_row[(num_rows,)](
        logits,
        label_columns,
        sums,
        num_rows,
        num_columns,
        block=_COLUMNS_OF_SUM,
        num_warps=_NUM_WARPS,
    )
    return sums


def turn_into_gradient(
    logits: Tensor, label_columns: Tensor, highest: Tensor, factors: Tensor, scale: Tensor
) -> None:
    """Write `softmax.turn_into_gradient` into the logits."""
    num_rows, num_columns = logits.shape
    assert logits.is_contiguous()
    _write_gradient[(num_rows, triton.cdiv(num_columns, _COLUMNS_OF_GRADIENT))](
        logits,
        label_columns,
        highest,
        factors,
        scale,
        num_columns,
        block=_COLUMNS_OF_GRADIENT,
        num_warps=_NUM_WARPS,
    )


# Not compiled anew for a last piece of another size.
@triton.jit(do_not_specialize=["num_rows"])
def _sum_row(  # type: ignore[no-untyped-def]
    logits,
    label_columns,
    sums,
    num_rows,
    num_columns: tl.constexpr,
    block: tl.constexpr,
):
    """Write the three numbers of a row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * num_columns

    highest = -float("inf")
    total = 0.0
    for start in range(0, num_columns, block):
        columns = start + tl.arange(0, block)
        values = tl.load(logits + columns, columns < num_columns, other=-float("inf"))
        values = values.to(tl.float32)
        higher = tl.maximum(highest, tl.max(values, 0))
        # The sum so far was of exponentials less a lower number.
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(values - higher), 0)
        highest = higher

    column = tl.load(label_columns + row)
    is_own = (column >= 0) & (column < num_columns)
    label_logit = tl.load(logits + column, is_own, other=0.0).to(tl.float32)
    tl.store(sums + row, highest)
    tl.store(sums + num_rows + row, total)
    tl.store(sums + 2 * num_rows + row, label_logit)


@triton.jit
def _write_gradient(  # type: ignore[no-untyped-def]
    logits,
    label_columns,
    highest,
    factors,
    scale,
    num_columns: tl.constexpr,
    block: tl.constexpr,
):
    """Write the gradient of a block of a row's logits."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    places = logits + row * num_columns + columns
    is_there = columns < num_columns

    values = tl.load(places, is_there, other=0.0).to(tl.float32)
    gradient = tl.exp(values - tl.load(highest + row)) * tl.load(factors + row)
    is_label = columns == tl.load(label_columns + row)
    gradient = tl.where(is_label, gradient - tl.load(scale), gradient)
    tl.store(places, gradient.to(logits.dtype.element_ty), is_there)
