"""Megatron's self-attention, with query, key and value made ready in one pass (`heads`).

Import it inside functions only: this module imports Megatron, which takes seconds.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from miles.train.model.data_parallel import await_weights
from miles.train.model.heads import HeadNorms, split_heads

if TYPE_CHECKING:
    from miles.train.model.packed_params import PackedParams
    from miles.train.model.rotary import Rotation


class PackedSelfAttention(SelfAttention):  # type: ignore[misc]
    """A `SelfAttention` that rotates its heads where it splits them; the parameters are Megatron's."""

    _rotation: Rotation | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedParams,
        **arguments: Any,
    ) -> Any:
        """Return the output and the bias, as Megatron does."""
        if packed_seq_params.rotation is not None:
            self._rotation = packed_seq_params.rotation
            packed_seq_params = copy.copy(packed_seq_params)
            packed_seq_params.rotation = None  # PackedAttention has nothing left to rotate
        try:
            return super().forward(
                hidden_states, attention_mask, packed_seq_params=packed_seq_params, **arguments
            )
        finally:
            self._rotation = None

    # megatron-core 0.16.1 and 0.19 split in this method.
    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, **arguments: Any
    ) -> Any:
        """Return query [tokens, 1, heads, size], key and value [tokens, 1, groups, size]."""
        if self._rotation is None:
            return super().get_query_key_value_tensors(hidden_states, key_value_states, **arguments)

        mixed, _ = self.linear_qkv(hidden_states)
        norms = None
        if self.config.qk_layernorm:
            await_weights(self.q_layernorm, self.k_layernorm)
            norms = HeadNorms(
                self.q_layernorm.weight, self.k_layernorm.weight, self.q_layernorm.eps
            )
        heads = split_heads(
            mixed.squeeze(1), self._rotation, norms, self.num_query_groups_per_partition
        )
        return tuple(each.unsqueeze(1) for each in heads)
