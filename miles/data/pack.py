"""Sample lengths -> micro-batches of bounded size, as many on every rank, balanced over ranks.

    lengths 5 4 3 3 2 1, capacity 6, dp_size 2:  18 tokens / (2 x 6)  ->  at least 2 micro-batches a rank

    longest first, each to the rank with the fewest tokens, there into the emptiest micro-batch that holds it:

        rank 0: {5} {3,1}    rank 1: {3,2} {4}

Packing is a pure function of the lengths; it changes no step's content, only where its samples are computed.
It alone turns the mask of *tokens* into a mask of *positions* whose label (the next token) is trained.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from miles.data.config import PackConfig
from miles.data.types import DUMMY_ROW_ID, Int32, Int64, MicroBatch, UInt8

DUMMY_TOKENS = 2
"""Length of the segment in a micro-batch that only keeps a rank in step."""


@dataclass(frozen=True)
class _Bin:
    tokens: int
    cost: int
    """sum of squared lengths: what attention costs"""
    samples: list[int]


def pack(lengths: Int32, config: PackConfig) -> list[list[list[int]]]:
    """Splits a step's samples over ranks and micro-batches.

    Args:
        lengths: int32 [samples], none above `config.capacity_tokens`.

    Returns:
        `[dp_rank][micro_batch]` -> indices of samples, ascending. Every rank has as many micro-batches (at
        least one), as few as a greedy finds; the fullest come first, so that a shortage of memory shows at
        once. Some are empty where there are too few samples.
    """
    capacity, num_ranks = config.capacity_tokens, config.dp_size
    assert len(lengths) == 0 or int(lengths.max()) <= capacity, "a sample is longer than a micro-batch"
    assert len(lengths) == 0 or int(lengths.min()) > 0, "an empty sample"
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    longest_first = list(zip(order.tolist(), lengths[order].tolist(), strict=True))
    num_micro_batches = min_micro_batches(lengths, config)
    while True:
        ranks = _even(longest_first, num_ranks, num_micro_batches, capacity)
        if ranks is None:
            bins = _tight_and_even(longest_first, num_ranks * num_micro_batches, capacity)
            ranks = None if bins is None else _to_ranks(bins, num_ranks)
        if ranks is not None:
            return [[sorted(bin_.samples) for bin_ in sorted(rank, key=_fullest_first)] for rank in ranks]
        num_micro_batches += 1


def min_micro_batches(lengths: Int32, config: PackConfig) -> int:
    """No packing has fewer micro-batches a rank: by the tokens, and by the samples of which no two fit together."""
    capacity, num_ranks = config.capacity_tokens, config.dp_size
    total_tokens = int(lengths.sum(dtype=np.int64))
    num_large = int(np.count_nonzero(2 * lengths.astype(np.int64) > capacity))
    return max(1, -(-total_tokens // (num_ranks * capacity)), -(-num_large // num_ranks))


def _fullest_first(bin_: _Bin) -> tuple[int, int, list[int]]:
    return -bin_.tokens, -bin_.cost, bin_.samples


def _even(
    longest_first: list[tuple[int, int]], num_ranks: int, num_micro_batches: int, capacity: int
) -> list[list[_Bin]] | None:
    """Each sample to the rank with the fewest tokens (then the least attention), there into the emptiest bin.

    None where a sample fits nowhere.
    """
    ranks = [(0, 0, rank) for rank in range(num_ranks)]  # a heap: tokens, attention, rank
    bins = [[(0, 0, index) for index in range(num_micro_batches)] for _ in range(num_ranks)]  # heaps
    samples: list[list[list[int]]] = [[[] for _ in range(num_micro_batches)] for _ in range(num_ranks)]
    for sample, length in longest_first:
        full = []
        while ranks and bins[ranks[0][2]][0][0] + length > capacity:
            full.append(heapq.heappop(ranks))
        if not ranks:
            return None
        rank_tokens, rank_cost, rank = ranks[0]
        tokens, cost, index = bins[rank][0]
        samples[rank][index].append(sample)
        heapq.heapreplace(bins[rank], (tokens + length, cost + length * length, index))
        heapq.heapreplace(ranks, (rank_tokens + length, rank_cost + length * length, rank))
        for entry in full:  # a shorter sample may still fit
            heapq.heappush(ranks, entry)
    return [
        [_Bin(tokens, cost, samples[rank][index]) for tokens, cost, index in bins[rank]] for rank in range(num_ranks)
    ]


def _tight_and_even(longest_first: list[tuple[int, int]], num_bins: int, capacity: int) -> list[_Bin] | None:
    """`_tight` with the least capacity, to within 1/64, with which it succeeds (Coffman's MULTIFIT, 1978)."""
    bins = _tight(longest_first, num_bins, capacity)
    if bins is None:
        return None
    low, high = sum(length for _, length in longest_first) // num_bins, capacity
    while (high - low) * 64 > capacity:
        middle = (low + high) // 2
        tried = _tight(longest_first, num_bins, middle)
        if tried is None:
            low = middle
        else:
            bins, high = tried, middle
    return bins


def _tight(longest_first: list[tuple[int, int]], num_bins: int, capacity: int) -> list[_Bin] | None:
    """Each sample into the fullest bin that still holds it; succeeds where even loads leave gaps too small to use."""
    room = [(capacity, index) for index in range(num_bins)]
    samples: list[list[int]] = [[] for _ in range(num_bins)]
    costs = [0] * num_bins
    for sample, length in longest_first:
        place = bisect_left(room, (length, -1))
        if place == num_bins:
            return None
        left, index = room.pop(place)
        samples[index].append(sample)
        costs[index] += length * length
        insort(room, (left - length, index))
    return [_Bin(capacity - left, costs[index], samples[index]) for left, index in room]


def _to_ranks(bins: list[_Bin], num_ranks: int) -> list[list[_Bin]]:
    """Fullest bin first, each to the rank with the fewest tokens (then the least attention) that still lacks bins."""
    ranks: list[list[_Bin]] = [[] for _ in range(num_ranks)]
    heap = [(0, 0, rank) for rank in range(num_ranks)]
    for bin_ in sorted(bins, key=_fullest_first):
        tokens, cost, rank = heap[0]
        ranks[rank].append(bin_)
        if len(ranks[rank]) == len(bins) // num_ranks:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (tokens + bin_.tokens, cost + bin_.cost, rank))
    return ranks


@dataclass(frozen=True)
class PackStats:
    """How well a step is packed."""

    pack_fill: float
    """tokens / (micro-batches x capacity)"""
    dp_imbalance: float
    """tokens of the fullest rank / mean over ranks; 1 is even"""


def pack_stats(lengths: Int32, micro_batches: Sequence[Sequence[Sequence[int]]], config: PackConfig) -> PackStats:
    """Measures what `pack` returned for these lengths (int32 [samples])."""
    rank_tokens = [sum(int(lengths[sample]) for batch in rank for sample in batch) for rank in micro_batches]
    total_tokens = sum(rank_tokens)
    num_micro_batches = sum(len(rank) for rank in micro_batches)
    if total_tokens == 0:
        return PackStats(pack_fill=0.0, dp_imbalance=1.0)
    return PackStats(
        pack_fill=total_tokens / (num_micro_batches * config.capacity_tokens),
        dp_imbalance=max(rank_tokens) * len(rank_tokens) / total_tokens,
    )


def micro_batch(
    input_ids: Int32, loss_mask: UInt8, segment_lengths: Int32, row_ids: Int64, source_ids: Int32
) -> MicroBatch:
    """Lays samples end to end, and shifts labels within each.

    A micro-batch without samples becomes a dummy: one segment of `DUMMY_TOKENS` tokens of id 0, none trained.

        ids  7 8 9 | 5 6     mask of tokens     0 1 1 | 0 1
        ->   labels  8 9 0 | 6 0     mask of positions  1 1 0 | 1 0     position_ids  0 1 2 | 0 1

    Args:
        input_ids: int32 [tokens]
        loss_mask: uint8 [tokens]: whether the token is trained
        segment_lengths: int32 [segments], all positive
        row_ids: int64 [segments]
        source_ids: int32 [segments]
    """
    if len(segment_lengths) == 0:
        input_ids = np.zeros(DUMMY_TOKENS, np.int32)
        loss_mask = np.zeros(DUMMY_TOKENS, np.uint8)
        segment_lengths = np.array([DUMMY_TOKENS], np.int32)
        row_ids = np.array([DUMMY_ROW_ID], np.int64)
        source_ids = np.zeros(1, np.int32)  # a valid index; its mask adds nothing to that source
    assert len(input_ids) == len(loss_mask) == int(segment_lengths.sum()), "lengths and tokens differ"
    assert len(segment_lengths) == len(row_ids) == len(source_ids), "one row and one source a segment"
    assert int(segment_lengths.min()) > 0, "an empty segment"
    cu_seqlens = _cumulative(segment_lengths)
    labels = np.zeros(len(input_ids), np.int64)
    labels[:-1] = input_ids[1:]
    label_mask = np.zeros(len(input_ids), np.float32)
    label_mask[:-1] = loss_mask[1:]
    last = cu_seqlens[1:] - 1  # what follows it is another segment's
    labels[last] = 0
    label_mask[last] = 0
    position_ids = np.arange(len(input_ids), dtype=np.int64) - np.repeat(cu_seqlens[:-1], segment_lengths)
    return MicroBatch(
        input_ids=input_ids.astype(np.int64),
        labels=labels,
        position_ids=position_ids,
        loss_mask=label_mask,
        cu_seqlens=cu_seqlens,
        source_ids=np.asarray(source_ids, np.int32),
        row_ids=np.asarray(row_ids, np.int64),
    )


def num_trained_labels(loss_mask: UInt8, segment_lengths: Int32) -> int:
    """Positions whose label is trained: trained tokens, less any that begin a segment (nothing predicts those).

    Args:
        loss_mask: uint8 [tokens]
        segment_lengths: int32 [segments], all positive
    """
    first = _cumulative(segment_lengths)[:-1]
    return int(loss_mask.sum(dtype=np.int64) - loss_mask[first].sum(dtype=np.int64))


def _cumulative(segment_lengths: Int32) -> Int32:
    cu_seqlens = np.zeros(len(segment_lengths) + 1, np.int32)
    np.cumsum(segment_lengths, out=cu_seqlens[1:])
    return cu_seqlens
