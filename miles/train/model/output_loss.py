"""The output layer and the loss on trained tokens only, piece by piece.

    hidden [tokens, hidden] -> the rows of the trained tokens -> pieces of `chunk_size` rows:
        logits of the piece -> losses -> the gradient of the logits, in their place
            -> the gradient of the piece's hidden rows, and a part of the weight's gradient

The logits of a whole micro-batch never exist. With gradients enabled, the forward pass computes
those of the loss's sum in the same loop, where the logits are at hand; the backward pass multiplies
them by the gradient that arrives and hands them on. The weight's gradient is summed in float32.

With n trained of t tokens, V rows of the vocabulary on this rank, hidden size h, b bytes a value
and c = min(chunk_size, n), a micro-batch takes, in bytes:

    in the forward pass     n h b  +  4 V h  +  c V b with fused kernels, c V (b + 4) without
    from there to backward  n h b  +  4 V h
    in the backward pass    n h b  +  4 V h  +  t h b  +  n h b  +  V h b (not with a tied embedding
                            on the same pipeline stage)

The second line is what autograd saves. Without gradients the terms with V h are not there.

With tensor parallelism each rank has the logits of a part of the vocabulary. The ranks exchange
three numbers a token: the highest logit, the sum of the exponentials below it, and the label's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miles.train.model.softmax import row_sums, turn_into_gradient
from miles.train.model.weight_gradients import accumulate


@dataclass(frozen=True)
class Targets:
    """The labels of a micro-batch, and which of them are trained."""

    labels: Tensor
    """int64 [1, tokens]"""
    positions: Tensor
    """int64 [trained tokens]: the places of the trained tokens, ascending"""


@dataclass(frozen=True)
class TokenLosses:
    """The losses of the trained tokens of a micro-batch."""

    total: Tensor
    """float32 scalar: their sum, to differentiate"""
    of_tokens: Tensor
    """float32 [trained tokens]; detached"""


@dataclass(frozen=True)
class OutputHead:
    """This rank's output layer, as the loss uses it."""

    weight: torch.nn.Parameter
    """[rows of the vocabulary on this rank, hidden]"""
    compute_logits: Callable[[Tensor], Tensor]
    """[rows, hidden] -> [rows, rows of the vocabulary on this rank], newly allocated"""
    chunk_size: int
    """trained tokens in a piece"""
    group: Any
    """process group of the tensor-parallel ranks"""
    reduces_hidden: bool
    """add up the gradient of the hidden states over that group; not with sequence parallelism,
    where it is added up while it is scattered"""
    is_fused: bool
    """compute the softmax in fused kernels where they are"""
    is_embedding: bool
    """the weight is the embedding of the same pipeline stage, too"""
    loss_scale: Tensor | None = None
    """scalar: what the loss will be multiplied by before the backward pass (float16). Gradients of
    logits too small for float16 are computed with it, as if it had been there already"""

    @property
    def first_token(self) -> int:
        """Return the token of this rank's first row of the vocabulary."""
        return int(self.group.rank()) * len(self.weight)

    @property
    def has_main_grad(self) -> bool:
        """Return whether the weight's gradient is summed in a buffer of Megatron's DDP."""
        return getattr(self.weight, "main_grad", None) is not None


def loss_in_pieces(hidden: Tensor, targets: Targets, head: OutputHead) -> TokenLosses:
    """Return the losses of the trained tokens of a micro-batch.

    All tensor-parallel ranks call it together, with the same targets.

    Args:
        hidden: [tokens, hidden], of all tokens, in the weight's precision.
    """
    if not torch.is_grad_enabled():
        losses = _losses(hidden, targets, head)
        return TokenLosses(losses.sum(), losses)

    # The embedding's part of the gradient comes by way of autograd, and with it the hook of DDP.
    # The other part goes into the buffer before.
    weight: Tensor = head.weight
    if head.is_embedding and head.has_main_grad:
        weight = weight.detach()
    total, losses = _LossInPieces.apply(hidden, weight, targets, head)
    return TokenLosses(total, losses)


def _losses(hidden: Tensor, targets: Targets, head: OutputHead) -> Tensor:
    """Return the losses of the trained tokens, without gradients."""
    rows = hidden.index_select(0, targets.positions)
    labels = targets.labels.flatten().index_select(0, targets.positions)

    losses = []
    for piece in _pieces(len(rows), head.chunk_size):
        softmax = _Softmax.of(rows[piece], labels[piece], head)
        losses.append(softmax.losses)
        del softmax  # its logits, before those of the next piece are computed
    return torch.cat(losses)


class _LossInPieces(torch.autograd.Function):
    """The sum of the losses, with gradients that are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Targets, head: OutputHead
    ) -> tuple[Tensor, Tensor]:
        """Return the losses' sum, scalar, and the losses [trained tokens]."""
        # A copy of our own: the gradient of a piece takes the place of the piece.
        rows = hidden.index_select(0, targets.positions)
        labels = targets.labels.flatten().index_select(0, targets.positions)

        losses = []
        weight_grad = _zeros_like(head.weight) if head.weight.requires_grad else None
        for piece in _pieces(len(rows), head.chunk_size):
            softmax = _Softmax.of(rows[piece], labels[piece], head)
            losses.append(softmax.losses)
            logits_grad = softmax.turn_into_gradient()
            if weight_grad is not None:
                accumulate(rows[piece], logits_grad, weight_grad)
            torch.mm(logits_grad, weight, out=rows[piece])
            # The logits of this piece, before those of the next are computed.
            del softmax, logits_grad

        ctx.save_for_backward(rows, weight_grad, targets.positions)
        ctx.num_tokens = len(hidden)
        ctx.head = head
        of_tokens = torch.cat(losses)
        ctx.mark_non_differentiable(of_tokens)
        return of_tokens.sum(), of_tokens

    @staticmethod
    def backward(
        ctx: Any, total_grad: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None]:
        """Return the gradients of the hidden states and, if they go that way, of the weight."""
        rows, weight_grad, positions = ctx.saved_tensors
        head: OutputHead = ctx.head
        factor = total_grad if head.loss_scale is None else total_grad / head.loss_scale

        reduction = None
        if head.reduces_hidden:
            reduction = torch.distributed.all_reduce(rows, group=head.group, async_op=True)
        weight_out = None
        if weight_grad is not None:
            weight_out = _hand_over(weight_grad, factor, head)
        if reduction is not None:
            reduction.wait()

        hidden_grad = rows.new_zeros(ctx.num_tokens, rows.shape[1])
        hidden_grad.index_copy_(0, positions, rows * factor)
        return hidden_grad, weight_out, None, None


def _pieces(num_rows: int, chunk_size: int) -> list[slice]:
    """Return the pieces of so many rows.

    No rows are one empty piece: the output layer is called at least once, since Megatron's DDP
    waits for its weight in a hook of that call, and begins to gather the next.
    """
    starts = range(0, max(num_rows, 1), chunk_size)
    return [slice(start, min(start + chunk_size, num_rows)) for start in starts]


@dataclass(frozen=True)
class _Softmax:
    """The softmax of a piece, over the vocabulary of all tensor-parallel ranks."""

    logits: Tensor
    """[rows, rows of the vocabulary on this rank], in the model's precision"""
    label_columns: Tensor
    """int64 [rows]: the label's column on this rank, outside of them where another rank has it"""
    highest: Tensor
    """float32 [rows]: the highest logit"""
    total: Tensor
    """float32 [rows]: the sum of the exponentials of the logits less the highest"""
    losses: Tensor
    """float32 [rows]"""
    head: OutputHead

    @classmethod
    def of(cls, rows: Tensor, labels: Tensor, head: OutputHead) -> _Softmax:
        """Return the softmax of hidden rows.

        Args:
            rows: [rows, hidden]
            labels: int64 [rows]
        """
        logits = head.compute_logits(rows)
        label_columns = labels - head.first_token
        sums = row_sums(logits, label_columns, is_fused=head.is_fused)
        highest, totals, label_logits = _of_all_ranks(sums, head.group).unbind(1)

        top = highest.amax(0)
        total = (totals * (highest - top).exp()).sum(0)
        losses = total.log() + (top - label_logits.sum(0))
        return cls(logits, label_columns, top, total, losses, head)

    def turn_into_gradient(self) -> Tensor:
        """Return the gradient of the losses' sum by the logits, in their memory."""
        head = self.head
        scale = self.total.new_ones(()) if head.loss_scale is None else head.loss_scale
        return turn_into_gradient(
            self.logits,
            self.label_columns,
            self.highest,
            scale / self.total,
            scale,
            is_fused=head.is_fused,
        )


def _of_all_ranks(sums: Tensor, group: Any) -> Tensor:
    """Return the three numbers a row of each tensor-parallel rank, [ranks, 3, rows]."""
    if group.size() == 1:
        return sums[None]
    of_ranks = sums.new_empty(group.size() * len(sums), sums.shape[1])
    torch.distributed.all_gather_into_tensor(of_ranks, sums, group=group)
    return of_ranks.view(group.size(), *sums.shape)


def _zeros_like(weight: Tensor) -> Tensor:
    """Return zeros in which a weight's gradient is summed: in float32, or more precisely."""
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def _hand_over(weight_grad: Tensor, factor: Tensor, head: OutputHead) -> Tensor | None:
    """Add the weight's gradient to Megatron's buffer, and return what autograd shall get.

    Args:
        weight_grad: float32 [rows of the vocabulary, hidden]
        factor: scalar, to multiply it by.
    """
    weight: Any = head.weight
    if not head.has_main_grad:
        return (weight_grad * factor).to(weight.dtype)

    weight.main_grad.addcmul_(weight_grad, factor)
    if head.is_embedding:
        return None
    # DDP's hook needs a gradient to come, and does not read it: that is what the mark says. The
    # mark is Megatron's own, for its linear layers that add to the buffer themselves.
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)
