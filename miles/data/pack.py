"""Sample lengths -> micro-batches, the same number on every rank, and micro-batches -> arrays.

With capacity 8 and two ranks, lengths 5 4 3 3 2 1 (18 tokens) need ceil(18 / 16) = 2 micro-batches a rank:

    rank 0: [5] [3, 1]    9 tokens
    rank 1: [4] [3, 2]    9 tokens

Samples are whole: never cut, never merged; each is an attention segment with positions from 0. Here alone
labels are shifted: label t is token t + 1 of the same segment, and the last position has none.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from miles.data.config import PackConfig
from miles.data.types import DUMMY_ROW_ID, Int32, Int64, MicroBatch, UInt8

DUMMY_TOKENS = 2


def pack(lengths: Int32, config: PackConfig) -> list[list[list[int]]]:
    """Distributes the samples of a step.

    Args:
        lengths: int32 [samples], none above the capacity.

    Returns:
        [dp_size][micro-batches][samples]: indices into `lengths`. An empty micro-batch is filled by a dummy.
    """
    capacity, ranks = config.capacity_tokens, config.dp_size
    assert not len(lengths) or int(lengths.max()) <= capacity, "samples over the capacity are dropped before"
    order = np.argsort(-lengths.astype(np.int64), kind="stable").tolist()
    sizes = lengths.tolist()
    total, large = int(lengths.sum()), int((lengths > capacity / 2).sum())
    count = max(1, -(-total // (ranks * capacity)), -(-large // ranks))
    while (bins := _fill(order, sizes, ranks * count, capacity)) is None:
        count += 1
    return _deal(bins, sizes, ranks, count)


def _fill(order: list[int], sizes: list[int], num_bins: int, capacity: int) -> list[list[int]] | None:
    """Longest first, each into the emptiest bin (attention cost breaks ties); else into the fullest that fits."""
    heap = [(0, 0, index) for index in range(num_bins)]
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for sample in order:
        load, cost, index = heap[0]
        if load + sizes[sample] > capacity:
            return _best_fit(order, sizes, num_bins, capacity)
        heapq.heapreplace(heap, (load + sizes[sample], cost + sizes[sample] ** 2, index))
        bins[index].append(sample)
    return bins


def _best_fit(order: list[int], sizes: list[int], num_bins: int, capacity: int) -> list[list[int]] | None:
    rooms = np.full(num_bins, capacity, np.int64)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for sample in order:
        left = rooms - sizes[sample]
        if left.max() < 0:
            return None
        index = int(np.where(left < 0, capacity + 1, left).argmin())
        rooms[index] -= sizes[sample]
        bins[index].append(sample)
    return bins


def _deal(bins: list[list[int]], sizes: list[int], ranks: int, count: int) -> list[list[list[int]]]:
    """Gives every rank `count` bins, the fullest first to the rank that has least."""
    loads = [sum(sizes[sample] for sample in samples) for samples in bins]
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    heap = [(0, rank) for rank in range(ranks)]
    for index in sorted(range(len(bins)), key=lambda index: -loads[index]):
        load, rank = heapq.heappop(heap)
        dealt[rank].append(sorted(bins[index]))
        if len(dealt[rank]) < count:
            heapq.heappush(heap, (load + loads[index], rank))
    return dealt


def balance(lengths: Int32, packed: list[list[list[int]]], config: PackConfig) -> tuple[float, float]:
    """`pack_fill`, tokens over capacity of all micro-batches, and `dp_imbalance`, fullest rank over mean."""
    loads = [int(sum(lengths[sample] for samples in rank for sample in samples)) for rank in packed]
    total = sum(loads)
    fill = total / (config.capacity_tokens * len(packed) * len(packed[0]))
    return fill, (max(loads) * len(loads) / total if total else 1.0)


def micro_batch(
    input_ids: Int32, loss_mask: UInt8, lengths: Sequence[int], row_ids: Int64, source_ids: Int32
) -> MicroBatch:
    """Shifts labels within segments.

    Args:
        input_ids: int32 [tokens], segments end to end.
        loss_mask: uint8 [tokens], of tokens.
        lengths: [segments]; none at all makes the dummy that keeps a rank in step.
    """
    if not len(lengths):
        return micro_batch(
            np.zeros(DUMMY_TOKENS, np.int32),
            np.zeros(DUMMY_TOKENS, np.uint8),
            [DUMMY_TOKENS],
            np.array([DUMMY_ROW_ID], np.int64),
            np.zeros(1, np.int32),
        )
    ends = np.cumsum(lengths)
    cu_seqlens = np.concatenate([[0], ends]).astype(np.int32)
    labels = np.roll(input_ids, -1).astype(np.int64)
    mask = np.roll(loss_mask, -1).astype(np.float32)
    labels[ends - 1] = 0
    mask[ends - 1] = 0
    return MicroBatch(
        input_ids=input_ids.astype(np.int64),
        labels=labels,
        position_ids=np.arange(len(input_ids), dtype=np.int64) - np.repeat(cu_seqlens[:-1], lengths),
        loss_mask=mask,
        cu_seqlens=cu_seqlens,
        source_ids=np.asarray(source_ids, np.int32),
        row_ids=np.asarray(row_ids, np.int64),
    )


def trained_labels(loss_mask: UInt8, lengths: Int32) -> Int64:
    """int64 [segments]: positions whose label is trained, which is all trained tokens but a segment's first."""
    if not len(lengths):
        return np.zeros(0, np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    return np.add.reduceat(loss_mask.astype(np.int64), starts) - loss_mask[starts]
