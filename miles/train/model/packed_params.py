"""The facts about a packed micro-batch that every layer of Megatron's is told.

Import it inside functions only: this module imports Megatron, which takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from miles.data.types import DUMMY_ROW_ID
from miles.train.model.attention_backends import Segments
from miles.train.model.device_batch import DeviceBatch
from miles.train.model.rotary import Rotation


@dataclass
class PackedParams(PackedSeqParams):
    """Megatron's parameters of packed sequences, and what `PackedAttention` needs beside them.

    Megatron hands them to the layers, and to those that it computes again, as they are.
    """

    segments: Segments | None = None
    """always there; None only because Megatron's fields before it have defaults"""
    rotation: Rotation | None = None
    """of each token; None where Megatron rotates query and key itself"""
    num_real: int = 0
    """tokens of samples; those of padding and of a dummy come behind them"""
    token_keys: Tensor | None = None
    """int64 [tokens], of `adapter_dropout`; None where nothing is dropped"""


def packed_params(
    batch: DeviceBatch, rotation: Rotation | None, token_keys: Tensor | None = None
) -> PackedParams:
    """Return the parameters of a micro-batch."""
    offsets: list[int] = batch.host.cu_seqlens.tolist()
    ends = offsets[1:]
    lengths = tuple(end - start for start, end in zip(offsets, ends, strict=False))
    num_samples = int((batch.host.row_ids != DUMMY_ROW_ID).sum())

    return PackedParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.longest,
        max_seqlen_kv=batch.longest,
        segments=Segments(batch.cu_seqlens, lengths, batch.short_cu_seqlens),
        rotation=rotation,
        num_real=offsets[num_samples],
        token_keys=token_keys,
    )
