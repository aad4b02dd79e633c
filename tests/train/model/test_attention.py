"""Attention over packed sequences, against attention with a mask."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from miles.train.model.attention import PackedAttention
from miles.train.model.attention_backends import Segments
from miles.train.model.rotary import Rotation

CONFIG: Any = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0, kv_channels=8)


def packed(lengths: tuple[int, ...], rotation: Rotation | None = None) -> Any:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    segments = Segments(cu_seqlens, lengths, cu_seqlens)
    return SimpleNamespace(segments=segments, rotation=rotation)


def test_packed_attention_is_masked_attention() -> None:
    torch.manual_seed(0)
    query = torch.randn(9, 4, 8)
    key = torch.randn(9, 2, 8)
    value = torch.randn(9, 2, 8)

    attention = PackedAttention(CONFIG, 1, None, "self")
    out = attention(query, key, value, packed_seq_params=packed((4, 5)))

    segment = torch.tensor([0] * 4 + [1] * 5)
    allowed = (segment[:, None] == segment) & torch.ones(9, 9, dtype=torch.bool).tril()
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(2, 1)) / 8**0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(2, 1)).reshape(9, -1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_query_and_key_are_rotated_and_the_value_is_not() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 8), torch.randn(3, 1, 8), torch.randn(3, 1, 8)
    half_turn = Rotation(cos=torch.full((3, 8), -1.0), sin=torch.zeros(3, 8))
    quarter_turn = Rotation(
        cos=torch.tensor([[1.0], [0.0], [1.0]]).expand(3, 8),
        sin=torch.tensor([[0.0], [1.0], [0.0]]).expand(3, 8),
    )

    attention = PackedAttention(CONFIG, 1, None, "self")
    plain = attention(query, key, value, packed_seq_params=packed((3,)))
    turned = attention(query, key, value, packed_seq_params=packed((3,), half_turn))
    apart = attention(query, key, value, packed_seq_params=packed((3,), quarter_turn))

    # Equal turns of query and key cancel; unequal ones do not.
    torch.testing.assert_close(turned, plain, rtol=0, atol=1e-6)
    assert (apart - plain).abs().max() > 0.1
    torch.testing.assert_close(apart[0], plain[0], rtol=0, atol=1e-6)


def test_float32_is_computed_by_segment_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = PackedAttention(CONFIG, 1, None, "self")
    monkeypatch.setattr(attention, "_attend", lambda query, *arguments: torch.zeros_like(query))
    query, key, value = torch.randn(3, 2, 8), torch.randn(3, 1, 8), torch.randn(3, 1, 8)
    assert attention(query, key, value, packed_seq_params=packed((3,))).any()

    in_half = [tensor.bfloat16() for tensor in (query, key, value)]
    assert not attention(*in_half, packed_seq_params=packed((3,))).any()
