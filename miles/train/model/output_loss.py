"""The output layer and the loss on trained tokens only, piece by piece.

    hidden [tokens, hidden] -> the rows of the trained tokens -> pieces of `chunk_size` rows:
        logits of the piece -> losses -> the gradient of the logits, in their place
            -> the gradient of the piece's hidden rows, in theirs, and a part of the weight's

The logits of a whole micro-batch never exist. With gradients enabled, the forward pass computes
those of the losses' sum in the same loop, where the logits are at hand. The weight's are added to
Megatron's float32 buffer, `main_grad`, at once; the hidden states' wait for the backward pass. So
the gradient that will arrive there must be known: it is 1, or the loss scale of float16. Without
such a buffer, both wait, and any gradient may arrive.

With n trained of t tokens, V rows of the vocabulary on this rank, hidden size h, b bytes a value
and c = min(chunk_size, n), a micro-batch takes, in bytes:

    in the forward pass     n h b  +  c V b with fused kernels, c V (b + 4) without
    from there to backward  n h b
    in the backward pass    n h b  +  t h b  +  V h b (not with a tied embedding on the same stage)

The second line is what autograd saves. Without `main_grad` there are 4 V h more in each line, the
weight's gradient. Without gradients the first line alone is taken.

With tensor parallelism each rank has the logits of a part of the vocabulary. The ranks exchange
three numbers a token: the highest logit, the sum of the exponentials below it, and the label's.
"""

from __future__ import annotations

import itertools
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
    loss_scale: Tensor
    """float32 scalar: the gradient of the losses' sum that the backward pass begins with. 1, or the
    loss scale of float16, without which gradients of logits would be too small for it"""

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

    total, losses = _LossInPieces.apply(hidden, head.weight, targets, head)
    return TokenLosses(total, losses)


def _losses(hidden: Tensor, targets: Targets, head: OutputHead) -> Tensor:
    """Return the losses of the trained tokens, without gradients."""
    rows = hidden.index_select(0, targets.positions)
    columns = _label_columns(targets, head)

    losses = []
    for piece in _pieces(len(rows), head.chunk_size):
        softmax = _Softmax.of(rows[piece], columns[piece], head)
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
        columns = _label_columns(targets, head)
        weight_grad = _sum_of_weight(head)

        losses = []
        for piece in _pieces(len(rows), head.chunk_size):
            softmax = _Softmax.of(rows[piece], columns[piece], head)
            losses.append(softmax.losses)
            logits_grad = softmax.turn_into_gradient()
            if weight_grad is not None:
                accumulate(rows[piece], logits_grad, weight_grad)
            torch.mm(logits_grad, weight, out=rows[piece])
            # The logits of this piece, before those of the next are computed.
            del softmax, logits_grad

        ctx.save_for_backward(rows, targets.positions, None if head.has_main_grad else weight_grad)
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
        rows, positions, weight_grad = ctx.saved_tensors
        head: OutputHead = ctx.head
        factor = total_grad / head.loss_scale

        if head.reduces_hidden:
            torch.distributed.all_reduce(rows, group=head.group)
        if head.has_main_grad:
            torch._assert_async(
                factor == 1, "the weight's gradient was added up for another gradient of the loss"
            )
        else:
            rows = rows * factor
        hidden_grad = rows.new_zeros(ctx.num_tokens, rows.shape[1])
        hidden_grad.index_copy_(0, positions, rows)

        if weight_grad is not None:
            weight_grad = (weight_grad * factor).to(head.weight.dtype)
        elif head.has_main_grad and not head.is_embedding:
            # The embedding gets a gradient by autograd in any case, and needs none.
            weight_grad = _placeholder(head.weight)
        return hidden_grad, weight_grad, None, None


def _label_columns(targets: Targets, head: OutputHead) -> Tensor:
    """Return the columns of the trained labels among this rank's logits, int64 [trained tokens].

    They are outside of them where another rank has the label.
    """
    labels = targets.labels.flatten().index_select(0, targets.positions)
    return labels - int(head.group.rank()) * len(head.weight)


def _pieces(num_rows: int, chunk_size: int) -> list[slice]:
    """Return pieces of about equal size, none larger than `chunk_size`: as few as can be.

    No rows are one empty piece: the output layer is called at least once, since Megatron's DDP
    waits for its weight in a hook of that call, and begins to gather the next.
    """
    num_pieces = max(-(-num_rows // chunk_size), 1)
    edges = [num_rows * number // num_pieces for number in range(num_pieces + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(edges)]


def _sum_of_weight(head: OutputHead) -> Tensor | None:
    """Return where the weight's gradient is summed; None where it needs none."""
    weight: Any = head.weight
    if not weight.requires_grad:
        return None
    if head.has_main_grad:
        main_grad: Tensor = weight.main_grad
        return main_grad
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def _placeholder(weight: Any) -> Tensor:
    """Return what autograd gets for a weight whose gradient is in `main_grad` already.

    DDP's hook needs a gradient to come, and does not read it: that is what the mark says. The mark
    is Megatron's own, for its linear layers that add to the buffer themselves.
    """
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


@dataclass(frozen=True)
class _Softmax:
    """The softmax of a piece, over the vocabulary of all tensor-parallel ranks."""

    logits: Tensor
    """[rows, rows of the vocabulary on this rank], in the model's precision"""
    label_columns: Tensor
    """int64 [rows]"""
    highest: Tensor
    """float32 [rows]: the highest logit"""
    total: Tensor
    """float32 [rows]: the sum of the exponentials of the logits less the highest"""
    losses: Tensor
    """float32 [rows]"""
    head: OutputHead

    @classmethod
    def of(cls, rows: Tensor, label_columns: Tensor, head: OutputHead) -> _Softmax:
        """Return the softmax of hidden rows.

        Args:
            rows: [rows, hidden]
            label_columns: int64 [rows], of `_label_columns`.
        """
        logits = head.compute_logits(rows)
        sums = row_sums(logits, label_columns, is_fused=head.is_fused)
        if head.group.size() > 1:
            sums = _over_ranks(sums, head.group)

        highest, total, label_logits = sums
        losses = total.log() + (highest - label_logits)
        return cls(logits, label_columns, highest, total, losses, head)

    def turn_into_gradient(self) -> Tensor:
        """Return the gradient of the losses' sum by the logits, in their memory."""
        scale = self.head.loss_scale
        return turn_into_gradient(
            self.logits,
            self.label_columns,
            self.highest,
            scale / self.total,
            scale,
            is_fused=self.head.is_fused,
        )


def _over_ranks(sums: Tensor, group: Any) -> Tensor:
    """Return the numbers of `row_sums` over all tensor-parallel ranks, [3, rows]."""
    of_ranks = sums.new_empty(group.size() * len(sums), sums.shape[1])
    torch.distributed.all_gather_into_tensor(of_ranks, sums, group=group)
    highest, totals, label_logits = of_ranks.view(group.size(), *sums.shape).unbind(1)

    top = highest.amax(0)
    total = (totals * (highest - top).exp()).sum(0)
    return torch.stack([top, total, label_logits.sum(0)])
