"""Attention over packed sequences, against attention with a mask."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from miles.train.model.attention import PackedAttention


def test_packed_attention_is_masked_attention() -> None:
    torch.manual_seed(0)
    config: Any = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0, kv_channels=8)
    query = torch.randn(9, 4, 8)
    key = torch.randn(9, 2, 8)
    value = torch.randn(9, 2, 8)

    packed = SimpleNamespace(cu_seqlens_q=torch.tensor([0, 4, 9]), max_seqlen_q=5)
    out = PackedAttention(config, 1, None, "self")(query, key, value, packed_seq_params=packed)

    segment = torch.tensor([0] * 4 + [1] * 5)
    allowed = (segment[:, None] == segment) & torch.ones(9, 9, dtype=torch.bool).tril()
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(2, 1)) / 8**0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(2, 1)).reshape(9, -1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
