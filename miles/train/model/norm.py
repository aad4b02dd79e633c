"""The root-mean-square norm that is put into Megatron's layer spec."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm with the constructor that Megatron calls.

    The norm of Megatron's local layer spec (`WrappedTorchNorm`, 0.16.1) refuses sequence
    parallelism. Here the weight is marked instead, so that Megatron adds up its gradient over the
    tensor-parallel ranks, each of which saw other tokens.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
