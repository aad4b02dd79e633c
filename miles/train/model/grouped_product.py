"""Products of many rows with many matrices, group by group, in one kernel.

    rows [rows, in], sorted by group   ends int32 [groups]: where each group ends
    weights: a matrix [out, in] for each group        ->  [rows, out]

The kernel wants the matrices as one tensor [groups, out, in]. The parameters stay one for each
expert, for the sake of checkpoints; but Megatron lays all parameters of a model into one buffer,
from the last to the first, so that the same matrix of all experts of a layer lies there at equal
distances, the last expert first. A strided view of the buffer is that tensor, without a copy, and
the same holds of the buffer of gradients. So group 0 is the last expert here. Frozen parameters are
in no such buffer: they are moved into one of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from miles.train.model.kernels import has_fused_kernels

_ALIGNMENT = 16
"""The bytes of which the strides of an operand must be a multiple."""


class GroupedWeights:
    """One matrix of each expert of a layer, as one tensor. Group 0 is the last expert.

    Args:
        parameters: [out, in] for each expert, in the order of the experts.
    """

    def __init__(self, parameters: Sequence[Any]) -> None:
        self.parameters: tuple[Any, ...] = tuple(reversed(parameters))
        if not any(parameter.requires_grad for parameter in parameters):
            lay_together(self.parameters)
        self._weights = _KnownView()
        self._sums = _KnownView()

    def stacked(self) -> Tensor:
        """Return the weights [groups, out, in]: a view where they lie evenly, otherwise a copy."""
        view = self._weights.of(self.parameters)
        if view is not None:
            return view
        return torch.stack([parameter.detach() for parameter in self.parameters])

    def add_to_main_grads(self, grads: Tensor, ends: Tensor) -> None:
        """Add gradients [groups, out, in] to the float32 sums that Megatron keeps.

        The parameters are marked, so that Megatron's hook does not add them once more. Where it
        keeps no sums, autograd collects the gradients as usual.

        Args:
            ends: int32 [groups]: where the rows of each group end.
        """
        try:
            sums = [parameter.main_grad for parameter in self.parameters]
        except AttributeError:
            return

        view = self._sums.of(sums)
        if view is None:
            for total, grad in zip(sums, grads.unbind(0), strict=True):
                total.add_(grad)
        elif has_fused_kernels(grads):
            from miles.train.model import expert_kernels

            expert_kernels.add_to_sums(view, grads, ends)
        else:
            view.add_(grads)
        for parameter in self.parameters:
            parameter.grad_added_to_main_grad = True


class _KnownView:
    """The view of some matrices as one tensor, sought anew only where they have moved."""

    def __init__(self) -> None:
        self._places: list[tuple[int, int]] = []
        self._view: Tensor | None = None

    def of(self, matrices: Sequence[Tensor]) -> Tensor | None:
        """Return the view, or None where `view_as_one` finds none."""
        places = [_place(matrix) for matrix in matrices]
        if places != self._places:
            self._places = places
            self._view = view_as_one(matrices)
        return self._view


def view_as_one(matrices: Sequence[Tensor]) -> Tensor | None:
    """Return matrices of one shape as one tensor [matrices, ...] that shares their memory.

    None where they do not lie in one buffer, each at the same distance behind the one before it.
    """
    first = matrices[0].detach()
    if any(not matrix.is_contiguous() for matrix in matrices):
        return None
    places = [_place(matrix) for matrix in matrices]
    storages = {storage for storage, _ in places}
    steps = {end - start for (_, start), (_, end) in pairwise(places)} or {first.numel()}
    step = min(steps)
    is_even = len(steps) == len(storages) == 1 and step >= first.numel()
    if not is_even or step * first.element_size() % _ALIGNMENT:
        return None

    shape, strides = (len(matrices), *first.shape), (step, *first.stride())
    view: Tensor = first.as_strided(shape, strides, first.storage_offset())
    return view


def lay_together(parameters: Sequence[Any]) -> None:
    """Move parameters of one shape into one tensor, where `view_as_one` finds them."""
    together = torch.stack([parameter.detach() for parameter in parameters])
    for parameter, matrix in zip(parameters, together.unbind(0), strict=True):
        parameter.data = matrix


def _place(tensor: Tensor) -> tuple[int, int]:
    """Return the storage of a tensor, and where in it the tensor begins."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def grouped_linear(rows: Tensor, ends: Tensor, weights: GroupedWeights) -> Tensor:
    """Return the product of each row with the transposed matrix of its group, [rows, out].

    Args:
        rows: [rows, in], sorted by group.
        ends: int32 [groups]: the number of rows up to each group's end.
    """
    product: Tensor = _GroupedLinear.apply(rows, ends, weights, *weights.parameters)
    return product


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, ends: Tensor, weights: GroupedWeights, *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, ends)
        ctx.weights = weights
        return multiply_rows(rows, weights.stacked().transpose(1, 2), ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, ends = ctx.saved_tensors
        weights: GroupedWeights = ctx.weights
        grad = grads[0].contiguous()
        needs_rows, _, _, *needs_weights = ctx.needs_input_grad

        grad_rows = multiply_rows(grad, weights.stacked(), ends) if needs_rows else None
        if not any(needs_weights):
            return (grad_rows, None, None, *[None] * len(needs_weights))

        # Megatron's hook of a parameter wants a gradient even where it has been added already.
        grad_weights = sum_outer_products(grad, rows, ends)
        weights.add_to_main_grads(grad_weights, ends)
        return (grad_rows, None, None, *grad_weights.unbind(0))


def multiply_rows(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Return rows [rows, in] times the matrix [in, out] of their group, [rows, out]."""
    if _has_kernel(rows, matrices):
        return torch._grouped_mm(rows, matrices, offs=ends)

    product = rows.new_empty(len(rows), matrices.shape[2])
    if len(rows) == 0:
        return product
    for group, (start, end) in enumerate(_bounds(ends)):
        torch.mm(rows[start:end], matrices[group], out=product[start:end])
    return product


def sum_outer_products(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Return the sum over each group's rows of left [rows, out] outer right [rows, in].

    [groups, out, in], zero for a group without rows.
    """
    if len(left) == 0:
        return left.new_zeros(len(ends), left.shape[1], right.shape[1])
    if _has_kernel(left, right):
        sums = torch._grouped_mm(left.t(), right, offs=ends)
        if _clears_empty_groups(left):
            return sums
        is_empty = ends.diff(prepend=ends.new_zeros(1)) == 0
        return sums.masked_fill_(is_empty[:, None, None], 0)

    sums = left.new_empty(len(ends), left.shape[1], right.shape[1])
    for group, (start, end) in enumerate(_bounds(ends)):
        torch.mm(left[start:end].t(), right[start:end], out=sums[group])
    return sums


def _has_kernel(first: Tensor, second: Tensor) -> bool:
    """Return whether torch multiplies these in groups, without a question to the GPU."""
    if len(first) == 0 or not hasattr(torch, "_grouped_mm"):
        return False
    if first.is_cuda and first.dtype is not torch.bfloat16:
        return False
    widths = (first.shape[1], *second.shape[1:])
    is_aligned = all(width * first.element_size() % _ALIGNMENT == 0 for width in widths)
    return is_aligned and first.dtype is not torch.float64


def _clears_empty_groups(tensor: Tensor) -> bool:
    """Return whether the kernel writes zeros for a group without rows.

    Hopper's and the CPU's do. On Blackwell the result is not zero (pytorch issue 172439).
    """
    return not tensor.is_cuda or torch.cuda.get_device_capability(tensor.device) == (9, 0)


def _bounds(ends: Tensor) -> list[tuple[int, int]]:
    """Return start and end of each group. The host waits for them."""
    return list(pairwise([0, *ends.tolist()]))
