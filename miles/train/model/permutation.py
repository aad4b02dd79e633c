"""Copy the rows of a tensor to where they are needed, and add up the copies again.

Two tokens, four experts, two experts a token: token 0 goes to experts 1 and 3, token 1 to 1 and 2.

    copies, by expert       token 0, token 1, token 1, token 0
    source                  [0, 1, 1, 0]      the row that each copy is of
    positions               [[0, 3], [1, 2]]  where the copies of each row are

Every shape is known on the host beforehand, so that nothing here waits for the GPU. Forward and
backward only gather: each is the other's derivative, and no addition depends on an order in time,
as atomic ones do on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miles.train.model.kernels import has_fused_kernels


@dataclass(frozen=True)
class Permutation:
    """The copies of rows, each row equally often."""

    source: Tensor
    """int64 [copies]: the row that a copy is of"""
    positions: Tensor
    """int64 [rows, copies of a row]: the places of a row's copies, ascending"""

    def copy(self, rows: Tensor) -> Tensor:
        """Return the copies [copies, width] of rows [rows, width]."""
        copies: Tensor = _Copy.apply(rows, self.source, self.positions)
        return copies

    def add_up(self, copies: Tensor) -> Tensor:
        """Return the sums [rows, width] of the copies [copies, width] of each row."""
        rows: Tensor = _AddUp.apply(copies, self.source, self.positions)
        return rows


@dataclass(frozen=True)
class Routing:
    """The way of tokens to experts."""

    permutation: Permutation
    """tokens -> copies, sorted by expert and then by token"""
    cells: Tensor
    """int64 [copies]: expert x tokens + token of each copy"""

    def of_copies(self, table: Tensor) -> Tensor:
        """Return the value of each copy, [copies], from a table [tokens, experts]."""
        return table.T.reshape(-1).index_select(0, self.cells)


def route(chosen: Tensor, num_choices: int) -> Routing:
    """Return the copies that the experts need of the tokens.

    Args:
        chosen: bool [tokens, experts]: `num_choices` experts of each token.
    """
    num_tokens = len(chosen)
    num_copies = num_tokens * num_choices
    cells = torch.nonzero_static(chosen.T.reshape(-1), size=num_copies, fill_value=0).flatten()
    source = cells.remainder(num_tokens)
    positions = source.argsort(stable=True).view(num_tokens, num_choices)
    return Routing(Permutation(source, positions), cells)


def sort_chunks(sizes: Tensor, num_rows: int) -> Permutation:
    """Return the permutation that sorts received rows by the group that they are for.

    Args:
        sizes: int64 [senders, groups]: the rows of each group that each sender sent. They came
            sender by sender, and of each sender group by group.
        num_rows: their sum, which the host must know.
    """
    num_chunks = sizes.numel()
    chunks = torch.arange(num_chunks, device=sizes.device)
    chunk_of_row = torch.repeat_interleave(chunks, sizes.flatten(), output_size=num_rows)
    source = chunk_of_row.remainder(sizes.shape[1]).argsort(stable=True)
    return Permutation(source, source.argsort()[:, None])


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        return rows.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _sum_of_copies(grads[0], *ctx.saved_tensors), None, None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, copies: Tensor, source: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return _sum_of_copies(copies, positions)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(0, *ctx.saved_tensors), None, None


def _sum_of_copies(copies: Tensor, positions: Tensor) -> Tensor:
    """Return [rows, ...] from [copies, ...] and [rows, copies of a row]."""
    if copies.dim() == 2 and positions.shape[1] > 1 and has_fused_kernels(copies):
        from miles.train.model import expert_kernels

        return expert_kernels.add_up_copies(copies, positions)

    picked = copies.index_select(0, positions.flatten())
    if positions.shape[1] == 1:
        return picked
    return picked.view(*positions.shape, *copies.shape[1:]).sum(1)
