"""The memory of the machine that a rank takes: rounded blocks, and what a save needs for a moment.

    pinned memory     torch hands it out in blocks of a power of two: 48 MiB take 64
    saving            masters and moments of all weights of the rank, gathered from the data-parallel
                      ranks; then the part that the rank writes is copied out of one after another

docs/memory.md has an example.
"""

from __future__ import annotations

from collections.abc import Sequence

from miles.architecture.config import ModelShape
from miles.architecture.sizes import key_size, query_size
from miles.train.compute_config import ComputeConfig
from miles.train.parallel_layout import Layout

_FLOAT32_BYTES = 4
_GATHERED_BYTES = 12
"""Master and two moments of a parameter, in float32: `get_parameter_state_dp_zero`."""
_MOVED_BYTES = 20
"""Of a parameter of the bucket that is being gathered: its own shard of all three, and of one what
comes from each rank, and all that in one piece."""
_LEAST_BUCKET = 40_000_000
_BUCKET_OF_A_RANK = 1_000_000
"""Megatron's bucket has as many parameters for each data-parallel rank, or the least."""


def saving_bytes(buffers: Sequence[int], compute: ComputeConfig, num_data_ranks: int) -> int:
    """Return the bytes of the machine's memory that a rank takes while a checkpoint is begun.

    Args:
        buffers: trained parameters of the rank, by Megatron's buffers.
        compute: with everything resolved that depends on the ranks.
    """
    largest = max(buffers)
    bucket = largest
    if compute.overlap_grad_reduce:
        size = compute.ddp_bucket_size or max(_LEAST_BUCKET, _BUCKET_OF_A_RANK * num_data_ranks)
        bucket = min(size, largest)
    # Of three tensors of a buffer, the views of one are copied before the next (`copy_views`).
    moved = max(_MOVED_BYTES * bucket, _FLOAT32_BYTES * largest)
    return _GATHERED_BYTES * sum(buffers) + moved


def rounded_up_bytes(shape: ModelShape, layout: Layout, num_embeddings: int) -> float:
    """Return the bytes by which the pinned gradients of a rank's matrices are rounded up.

    Args:
        num_embeddings: embeddings and output layers on the rank.
    """
    hidden, tensor = shape.hidden_size, layout.tensor
    queries, keys = query_size(shape), key_size(shape)
    num_layers = shape.num_layers // layout.pipeline
    rows = -(-shape.vocab_size // tensor)

    dense = num_embeddings * _lost(rows * hidden)
    dense += num_layers * (
        _lost((queries + 2 * keys) // tensor * hidden) + _lost(queries // tensor * hidden)
    )
    if shape.num_experts is None:
        width = shape.ffn_hidden_size // tensor
        dense += num_layers * (_lost(2 * width * hidden) + _lost(width * hidden))
        return dense / layout.data

    width = shape.moe_ffn_hidden_size // layout.expert_tensor
    num_experts = num_layers * shape.num_experts // layout.expert
    experts = num_experts * (_lost(2 * width * hidden) + _lost(width * hidden))
    # Experts that are not spread are divided as the rest is.
    return dense / layout.data + experts / layout.expert_data


def _lost(num_values: int) -> int:
    """Return the bytes that a pinned block of float32 values has beyond them."""
    num_bytes = num_values * _FLOAT32_BYTES
    return (1 << (num_bytes - 1).bit_length()) - num_bytes
