"""Dropout of an adapter's input, by arithmetic: no random state, and the same on any layout.

    token key      a hash of seed, step, row id and position in the row         once a micro-batch
    row key        a hash of the token key, the layer and the projection        [tokens]
    channel key    a hash of the channel's number in the whole input            [in]

    an element is dropped where a hash of  row key xor channel key  is below the share

So each rank drops the same elements of the same token, however tokens, channels and layers are
divided among the ranks; so does a pass that is computed again, and a run that was resumed.

The hash of a key is the finalizer of splitmix64 (Steele et al., 2014). That of an element, of which
there are many, is the middle of MurmurHash3's (Appleby): what it begins and ends with would be for
keys that are not random, and for the lower bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miles.architecture.adapter import TARGETS
from miles.train.model.device_batch import DeviceBatch


def token_keys(batch: DeviceBatch, seed: int, step: int) -> Tensor:
    """Return a key for each token of a micro-batch, int64 [tokens].

    Args:
        seed: of the run.
        step: number of the step, over the whole run.
    """
    of_segment = _mix(batch.row_of_segment + _mix_number(_mix_number(seed) + step))
    of_token = of_segment.index_select(0, batch.segment_of_token)
    return _mix(of_token + batch.position_ids[0])


def channel_keys(first: int, num_channels: int) -> Tensor:
    """Return a key for each of some channels of a projection's input, int32 [channels].

    Args:
        first: number of the first in the whole input.
    """
    return _low_bits(_mix(torch.arange(first, first + num_channels) + _mix_number(1)))


@dataclass(frozen=True)
class Dropout:
    """The elements of one projection's input that are dropped in one pass."""

    row_keys: Tensor
    """int32 [tokens]"""
    channels: Tensor
    """int32 [in]: `channel_keys` of this rank's channels"""
    share: float
    """of the elements: above 0, below 1"""

    @classmethod
    def of(cls, tokens: Tensor, layer: int, target: str, channels: Tensor, share: float) -> Dropout:
        """Return the dropout of a projection.

        Args:
            tokens: `token_keys` of the tokens of the input.
            layer: number in the whole model.
        """
        place = layer * len(TARGETS) + TARGETS.index(target)
        row_keys = _low_bits(_mix(tokens ^ _mix_number(place)))
        return cls(row_keys, channels, share)

    def dropped(self) -> Tensor:
        """Return which elements are dropped, bool [tokens, in]."""
        bits = self.row_keys[:, None] ^ self.channels
        bits *= _signed(0x85EBCA6B, 32)
        bits ^= (bits >> 13) & _ones(19)
        bits *= _signed(0xC2B2AE35, 32)
        # Every int32 is as likely as any other. The highest bits count most, which are the best.
        return bits < round(self.share * 2**32) - 2**31

    def product(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Return the product of what is left of the inputs with a weight, times 1 / (1 - share).

        The inputs alone are kept for the backward pass, not what is left of them.

        Args:
            inputs: [tokens, in].
            weight: [out, in].
        """
        product: Tensor = _DroppedProduct.apply(inputs, weight, self)
        return product


class _DroppedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, dropout: Dropout) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.dropout = dropout
        left = inputs.masked_fill(dropout.dropped(), 0)
        return (left @ weight.t()).div_(1 - dropout.share)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        needs_inputs, needs_weight, _ = ctx.needs_input_grad
        dropped = ctx.dropout.dropped()
        grad = grads[0] / (1 - ctx.dropout.share)

        grad_inputs = grad_weight = None
        if needs_inputs:
            grad_inputs = (grad @ weight).masked_fill_(dropped, 0)
        if needs_weight:
            grad_weight = grad.t() @ inputs.masked_fill(dropped, 0)
        return grad_inputs, grad_weight, None


# --- splitmix64's finalizer

_SPLITMIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _mix(values: Tensor) -> Tensor:
    """Return a hash of each value, int64. Products wrap; shifts to the right fill with zeros."""
    for shift, factor in _SPLITMIX:
        values = (values ^ ((values >> shift) & _ones(64 - shift))) * _signed(factor, 64)
    return values ^ ((values >> 31) & _ones(33))


def _mix_number(value: int) -> int:
    """Return the same of a number."""
    value &= _ones(64)
    for shift, factor in _SPLITMIX:
        value = (value ^ (value >> shift)) * factor & _ones(64)
    return _signed(value ^ (value >> 31), 64)


def _low_bits(values: Tensor) -> Tensor:
    """Return the lower half of each int64 as int32."""
    return values.view(torch.int32)[..., ::2].contiguous()  # little-endian


def _ones(num_bits: int) -> int:
    return (1 << num_bits) - 1


def _signed(value: int, num_bits: int) -> int:
    """Return the signed number that has the same bits."""
    value &= _ones(num_bits)
    return value - (1 << num_bits) if value >> (num_bits - 1) else value
