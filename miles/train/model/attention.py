"""Attention over packed sequences, for Megatron's layer spec.

    query [tokens, heads, head size]   key, value [tokens, groups, head size]
        ->  [tokens, heads x head size]

Each segment of `cu_seqlens` is causal within itself and sees nothing of its neighbours. On CUDA
this is the variable-length flash attention that torch ships. On a CPU it is
`scaled_dot_product_attention` segment by segment, which is the definition of what is computed.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class PackedAttention(torch.nn.Module):
    """Core attention for `PackedSeqParams` in THD layout.

    The constructor and the call have the arguments that Megatron passes; some of them have no use
    here.
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
    ) -> None:
        super().__init__()
        assert config.context_parallel_size == 1, (
            "context parallelism is refused by the configuration"
        )
        assert config.attention_dropout == 0.0, "fine-tuning runs without dropout"
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Return [tokens, heads x head size]. The segments alone decide who sees whom."""
        assert packed_seq_params is not None, "this attention takes packed sequences only"
        assert attention_bias is None
        attend = _attend_varlen if query.is_cuda else _attend_by_segment
        out = attend(
            query,
            key,
            value,
            packed_seq_params.cu_seqlens_q,
            packed_seq_params.max_seqlen_q,
            self.softmax_scale,
        )
        return out.reshape(out.shape[0], -1)


def _attend_by_segment(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    """Return attention [tokens, heads, head size], one segment at a time."""
    lengths = cu_seqlens.diff().tolist()
    segments = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)

    outputs = []
    for q, k, v in segments:
        # torch wants [batch, heads, tokens, head size]
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )
        outputs.append(out[0].transpose(0, 1))

    return torch.cat(outputs)


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    """Return attention [tokens, heads, head size] from torch's variable-length kernel."""
    function, options, must_repeat_groups = _varlen_function()
    if must_repeat_groups and key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(repeats, dim=1)
        value = value.repeat_interleave(repeats, dim=1)

    return function(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scale,
        **options,
    )


@functools.cache
def _varlen_function() -> tuple[Callable[..., Tensor], dict[str, Any], bool]:
    """Return torch's varlen attention, its options, and whether to repeat key and value heads.

    torch 2.10 takes `is_causal`, later releases `window_size=(-1, 0)`. Grouped queries need
    `enable_gqa` where that parameter exists (2.13), and equal numbers of heads where it does not.
    """
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if "is_causal" in parameters:
        options["is_causal"] = True
    else:
        options["window_size"] = (-1, 0)

    has_gqa = "enable_gqa" in parameters
    if has_gqa:
        options["enable_gqa"] = True
    return varlen_attn, options, not has_gqa
