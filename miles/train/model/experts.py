"""The experts of a layer in grouped products, beside Megatron's modules that hold their weights.

Megatron's `SequentialMLP` runs one expert after another: for 128 experts some 1,500 small kernels
a layer, and a wait for the GPU to learn how many tokens each has. Its parameters and their names
stay as they are here; what is replaced is the way to compute with them, and the dispatcher, which
brings the tokens in the order that the grouped product wants.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.train.model import device
from miles.train.model.data_parallel import await_weights
from miles.train.model.grouped_product import GroupedWeights, grouped_linear
from miles.train.model.token_dispatch import TokenDispatcher
from miles.train.model.weighted_swiglu import weighted_swiglu
from miles.train.precision import Precision

CANNOT_GROUP = (
    "--moe-grouped-gemm has no effect: on a GPU it needs bfloat16, Hopper or newer, and a torch "
    "with grouped products; the experts run one after another"
)


def can_group(precision: Precision) -> bool:
    """Return whether the experts can be computed in grouped products here.

    On a GPU torch has a kernel for bfloat16, from Hopper on; for anything else it waits for the
    GPU and multiplies group by group.
    """
    if not device.has_gpu():
        return True
    is_known = torch.cuda.get_device_capability() >= (9, 0) and hasattr(torch, "_grouped_mm")
    return is_known and precision is Precision.BF16


def group_experts(model: Any) -> None:
    """Let the experts of all layers of a `GPTModel` be computed in grouped products."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.token_dispatcher = TokenDispatcher(layer.token_dispatcher)
            layer.experts.forward = GroupedExperts(layer.experts).forward


class GroupedExperts:
    """The computation of a layer's experts.

    Args:
        experts: Megatron's `SequentialMLP`: SwiGLU without biases.
    """

    def __init__(self, experts: Any) -> None:
        config = experts.config
        assert config.gated_linear_unit
        assert config.activation_func is F.silu
        assert not config.add_bias_linear
        self._is_fused: bool = config.use_te_activation_func
        self._first = [expert.linear_fc1 for expert in experts.local_experts]
        self._second = [expert.linear_fc2 for expert in experts.local_experts]

    @functools.cached_property
    def _gate_and_up(self) -> GroupedWeights:
        return GroupedWeights([linear.weight for linear in self._first])

    @functools.cached_property
    def _down(self) -> GroupedWeights:
        return GroupedWeights([linear.weight for linear in self._second])

    def forward(self, rows: Tensor, ends: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Return what the experts make of their tokens [rows, hidden], times the probability.

        Args:
            rows: the tokens of the last expert, then those of the one before it, and so on.
            ends: int32 [experts]: where the tokens of each end.
            probs: [rows]: the router's weight of each.
        """
        await_weights(*self._first, *self._second)
        gate_and_up = grouped_linear(rows, ends, self._gate_and_up)
        activated = weighted_swiglu(gate_and_up, probs, is_fused=self._is_fused)
        return grouped_linear(activated, ends, self._down), None
