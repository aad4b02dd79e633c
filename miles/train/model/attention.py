"""Attention over packed sequences, for Megatron's layer spec.

    query [tokens, heads, head size]   key, value [tokens, groups, head size]
        ->  rotated by position  ->  attention within each segment  ->  [tokens, heads x head size]

`rotary` has the angles, `kernels` the rotation, `attention_backends` the attention.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from miles.train.compute_config import AS_USUAL, ComputeConfig
from miles.train.model.attention_backends import KERNEL_DTYPES, attention, by_segment
from miles.train.model.kernels import rope

if TYPE_CHECKING:
    from miles.train.model.packed_params import PackedParams


class PackedAttention(torch.nn.Module):
    """Core attention for `PackedParams` in THD layout.

    The constructor and the call have the arguments that Megatron passes; some of them have no use
    here. `compute` comes from the layer spec.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        compute: ComputeConfig = AS_USUAL,
    ) -> None:
        super().__init__()
        assert config.context_parallel_size == 1, (
            "context parallelism is refused by the configuration"
        )
        assert config.attention_dropout == 0.0, "fine-tuning runs without dropout"
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self._attend = attention(compute.attention_backend)
        self._is_rope_fused = compute.rope_fusion

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedParams | None = None,
    ) -> Tensor:
        """Return [tokens, heads x head size]. The segments alone decide who sees whom."""
        assert packed_seq_params is not None, "this attention takes packed sequences only"
        assert packed_seq_params.segments is not None
        assert attention_bias is None

        rotation = packed_seq_params.rotation
        if rotation is not None:
            query, key = rope(query, key, rotation.cos, rotation.sin, is_fused=self._is_rope_fused)

        attend = self._attend if query.dtype in KERNEL_DTYPES else by_segment
        out = attend(query, key, value, packed_seq_params.segments, self.softmax_scale)
        return out.reshape(out.shape[0], -1)
