"""SwiGLU as the activation that Megatron's MLPs, dense or of an expert, call between their linears.

Megatron's own ways to fuse it are `torch.compile` and Transformer Engine's activation; this takes
the place of the latter in the layer specification (`use_te_activation_func`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles.train.model.kernels import silu_mul


class SwiGLU(torch.nn.Module):
    """silu(gate) * up, without parameters. The constructor is as Megatron calls it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        assert config.activation_func is torch.nn.functional.silu
        assert config.gated_linear_unit

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """Return [..., size] of [..., 2 x size]."""
        return silu_mul(gate_and_up)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return nothing to save. Megatron's MLP asks each of its modules."""
        return {}
