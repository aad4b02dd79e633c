"""The output layer and the loss on trained tokens only, piece by piece.

    hidden [tokens, hidden] -> the rows of the trained tokens -> pieces of `chunk_size` rows:
        logits of the piece -> losses -> the gradient of the logits, in their place
            -> the gradient of the piece's hidden rows, and a part of the weight's gradient

The logits of a whole micro-batch never exist. With gradients enabled, the forward pass computes
those of the loss's sum in the same loop, where the logits are at hand; the backward pass multiplies
them by the gradient that arrives and hands them on. The weight's gradient is summed in float32.

With n trained of t tokens, V rows of the vocabulary on this rank, hidden size h, b bytes a value
and c = min(chunk_size, n), a micro-batch takes, in bytes:

    in the forward pass     n h b  +  4 V h  +  c V (b + 4), or c V 4 where b = 4
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
    is_embedding: bool
    """the weight is the embedding of the same pipeline stage, too"""
    loss_scale: Tensor | None = None
    """scalar: what the loss will be multiplied by before the backward pass (float16). Gradients of
    logits too small for float16 are computed with it, as if it had been there already"""

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
        softmax = _Softmax.of(head.compute_logits(rows[piece]), labels[piece], head.group)
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
        wants_weight = head.weight.requires_grad
        # A copy of our own: the gradient of a piece takes the place of the piece.
        rows = hidden.index_select(0, targets.positions)
        labels = targets.labels.flatten().index_select(0, targets.positions)

        losses = []
        weight_grad: Tensor | None = None
        for piece in _pieces(len(rows), head.chunk_size):
            softmax = _Softmax.of(head.compute_logits(rows[piece]), labels[piece], head.group)
            losses.append(softmax.losses)
            logits_grad = softmax.turn_into_gradient(head.loss_scale)
            if wants_weight:
                weight_grad = _add_product(weight_grad, logits_grad, rows[piece])
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
    exponentials: Tensor
    """float32, likewise: of the logits, less the highest on this rank. It may be the same memory"""
    factors: Tensor
    """float32 [rows]: an exponential x this = a probability"""
    losses: Tensor
    """float32 [rows]"""
    columns: Tensor
    """int64 [rows, 1]: the label's column on this rank; any, where another rank has it"""
    is_own: Tensor
    """bool [rows, 1]: the label's logit is on this rank"""

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, group: Any) -> _Softmax:
        """Return the softmax of logits, in whose memory it may lie.

        Args:
            logits: [rows, rows of the vocabulary on this rank]
            labels: int64 [rows]
        """
        num_columns = logits.shape[1]
        columns = (labels - group.rank() * num_columns)[:, None]
        is_own = (columns >= 0) & (columns < num_columns)
        columns = columns.clamp(0, num_columns - 1)

        values = logits.to(torch.promote_types(logits.dtype, torch.float32))
        highest = values.amax(1)
        label_logit = values.gather(1, columns)[:, 0]
        exponentials = values.sub_(highest[:, None]).exp_()
        total = exponentials.sum(1)

        own = torch.stack([highest, total, label_logit.where(is_own[:, 0], 0.0)])
        log_total = _log_total(own, group)
        return cls(
            logits=logits,
            exponentials=exponentials,
            factors=(highest - log_total[0]).exp_(),
            losses=log_total[0] - log_total[1],
            columns=columns,
            is_own=is_own,
        )

    def turn_into_gradient(self, scale: Tensor | None) -> Tensor:
        """Return the gradient of the losses' sum by the logits, times a scale, in their memory."""
        factors = self.factors if scale is None else self.factors * scale
        ones = torch.ones_like(factors) if scale is None else scale.expand_as(factors)
        of_labels = self.exponentials.gather(1, self.columns) * factors[:, None]
        of_labels = of_labels - self.is_own * ones[:, None]

        gradient = torch.mul(self.exponentials, factors[:, None], out=self.logits)
        return gradient.scatter_(1, self.columns, of_labels.to(gradient.dtype))


def _log_total(own: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Return the logarithm of all ranks' exponentials, and the label's logit: float32 [rows] each.

    Args:
        own: float32 [3, rows]: this rank's highest logit, its exponentials' sum below that, and the
            label's logit, or 0 where another rank has it.
    """
    of_ranks = own
    if group.size() > 1:
        of_ranks = own.new_empty(group.size() * 3, own.shape[1])
        torch.distributed.all_gather_into_tensor(of_ranks, own, group=group)

    highest, totals, label_logits = of_ranks.view(group.size(), *own.shape).unbind(1)
    top = highest.amax(0)
    total = (totals * (highest - top).exp()).sum(0)
    return total.log() + top, label_logits.sum(0)


def _add_product(total: Tensor | None, logits_grad: Tensor, rows: Tensor) -> Tensor:
    """Add a piece's gradient of the weight to that of the pieces before, in float32.

    Args:
        total: float32 [rows of the vocabulary, hidden], or None for the first piece.
        logits_grad: [rows, rows of the vocabulary]
        rows: [rows, hidden]
    """
    product = logits_grad.t() @ rows
    if total is None:
        return product.to(torch.promote_types(product.dtype, torch.float32))
    return total.add_(product)


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
