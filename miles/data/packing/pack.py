"""Sample lengths -> micro-batches of bounded size, as many on every rank, balanced over ranks.

    lengths 5 4 3 3 2 1, capacity 6, dp_size 2:  18 tokens / (2 x 6)  ->  at least 2 micro-batches a rank

    longest first, each to the rank with the fewest tokens, there into the emptiest micro-batch that holds it:

        rank 0: {5} {3,1}    rank 1: {3,2} {4}

    where the fullest rank then holds too much, it exchanges samples with others. 9 8 6 4 4 over two ranks:

        {9,4,4} {8,6}  ->  9 for 8  ->  {8,4,4} {9,6}

Packing is a pure function of the lengths; it changes no step's content, only where its samples are computed.
It alone turns the mask of *tokens* into a mask of *positions* whose label (the next token) is trained.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from miles.common.offsets import offsets_of
from miles.data.config import PackConfig
from miles.data.types import DUMMY_ROW_ID, Int32, Int64, MicroBatch, UInt8

DUMMY_TOKENS = 2
"""Length of the segment in a micro-batch that only keeps a rank in step."""

_LEVEL = 1.005
"""Exchanges stop where the fullest rank holds at most so many times what it must: the mean, or the longest sample."""
_MAX_TRIALS = 2_048
"""Pairs of ranks that are looked at for an exchange, at most: bounds the time where there are very many samples."""
_MAX_OFFERS = 256
"""Samples that a rank offers in an exchange, at most; of more, every n-th."""

_Bin = list[int]
"""The samples of a micro-batch, or of one to be."""
_Rank = list[_Bin]


def pack(lengths: Int32, config: PackConfig) -> list[list[list[int]]]:
    """Splits a step's samples over ranks and micro-batches.

    Args:
        lengths: int32 [samples], none above `config.capacity_tokens`.

    Returns:
        `[dp_rank][micro_batch]` -> indices of samples, ascending. Every rank has as many micro-batches (at
        least one): `min_micro_batches`, or as few more as are found to do. The fullest come first, so that a
        shortage of memory shows at once. Some are empty where there are too few samples.
    """
    capacity, num_ranks = config.capacity_tokens, config.dp_size
    assert len(lengths) == 0 or int(lengths.max()) <= capacity, (
        "a sample is longer than a micro-batch"
    )
    assert len(lengths) == 0 or int(lengths.min()) > 0, "an empty sample"
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    longest_first = list(zip(order.tolist(), lengths[order].tolist(), strict=True))
    tokens = lengths.tolist()
    num_micro_batches = min_micro_batches(lengths, config)
    while (ranks := _fill(longest_first, tokens, num_ranks, num_micro_batches, capacity)) is None:
        num_micro_batches += 1
    must_hold = max(-(-sum(tokens) // num_ranks), max(tokens, default=0))
    ranks = _level(ranks, tokens, capacity, int(_LEVEL * must_hold))
    return [
        sorted(map(sorted, rank), key=lambda bin_: _fullest_first(bin_, tokens)) for rank in ranks
    ]


def min_micro_batches(lengths: Int32, config: PackConfig) -> int:
    """No packing has fewer micro-batches a rank: by the tokens, and by the samples of which no two fit together."""
    capacity, num_ranks = config.capacity_tokens, config.dp_size
    total_tokens = int(lengths.sum(dtype=np.int64))
    num_large = int(np.count_nonzero(2 * lengths.astype(np.int64) > capacity))
    return max(1, -(-total_tokens // (num_ranks * capacity)), -(-num_large // num_ranks))


def _load(bin_: _Bin, tokens: list[int]) -> tuple[int, int]:
    """Tokens, and the sum of squared lengths: what attention costs."""
    lengths = [tokens[sample] for sample in bin_]
    return sum(lengths), sum([length * length for length in lengths])


def _fullest_first(bin_: _Bin, tokens: list[int]) -> tuple[int, int, _Bin]:
    num_tokens, cost = _load(bin_, tokens)
    return -num_tokens, -cost, bin_


def _fill(
    longest_first: list[tuple[int, int]],
    tokens: list[int],
    num_ranks: int,
    num_micro_batches: int,
    capacity: int,
) -> list[_Rank] | None:
    """Ranks of so many micro-batches each; None where none of three ways finds them."""
    ranks = _even(longest_first, num_ranks, num_micro_batches, capacity)
    if ranks is not None:
        return ranks
    num_bins, unlimited = num_ranks * num_micro_batches, sum(tokens)
    level = _level(_even(longest_first, num_bins, 1, unlimited) or [], tokens, unlimited, capacity)
    bins: list[_Bin] | None = [bin_ for (bin_,) in level]
    if max(_load(bin_, tokens)[0] for (bin_,) in level) > capacity:
        bins = _tight(longest_first, num_bins, capacity)
    return None if bins is None else _to_ranks(bins, tokens, num_ranks)


def _even(
    longest_first: list[tuple[int, int]], num_ranks: int, num_micro_batches: int, capacity: int
) -> list[_Rank] | None:
    """Each sample to the rank with the fewest tokens (then the least attention), there into the emptiest bin.

    None where a sample fits nowhere.
    """
    ranks = [(0, 0, rank) for rank in range(num_ranks)]  # a heap: tokens, attention, rank
    bins = [
        [(0, 0, index) for index in range(num_micro_batches)] for _ in range(num_ranks)
    ]  # heaps
    samples: list[_Rank] = [[[] for _ in range(num_micro_batches)] for _ in range(num_ranks)]
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
    return samples


def _tight(longest_first: list[tuple[int, int]], num_bins: int, capacity: int) -> list[_Bin] | None:
    """Each sample into the fullest bin that still holds it. None where a sample fits nowhere."""
    room = [(capacity, index) for index in range(num_bins)]
    samples: list[_Bin] = [[] for _ in range(num_bins)]
    for sample, length in longest_first:
        place = bisect_left(room, (length, -1))
        if place == num_bins:
            return None
        left, index = room.pop(place)
        samples[index].append(sample)
        insort(room, (left - length, index))
    return samples


def _to_ranks(bins: list[_Bin], tokens: list[int], num_ranks: int) -> list[_Rank]:
    """Fullest bin first, each to the rank with the fewest tokens (then the least attention) that still lacks bins."""
    ranks: list[_Rank] = [[] for _ in range(num_ranks)]
    heap = [(0, 0, rank) for rank in range(num_ranks)]
    for bin_tokens, bin_cost, bin_ in sorted(_fullest_first(bin_, tokens) for bin_ in bins):
        rank_tokens, rank_cost, rank = heap[0]
        ranks[rank].append(bin_)
        if len(ranks[rank]) == len(bins) // num_ranks:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (rank_tokens - bin_tokens, rank_cost - bin_cost, rank))
    return ranks


def _level(ranks: list[_Rank], tokens: list[int], capacity: int, limit: int) -> list[_Rank]:
    """The fullest rank exchanges samples with the emptiest that it can, until no rank holds more than `limit` tokens.

    Args:
        tokens: length of each sample.
        capacity: tokens of a micro-batch.

    Returns:
        Ranks of which the fullest holds no more than before; above `limit` where no exchange helps it.
    """
    loads = sorted(
        (*_load([sample for bin_ in rank for sample in bin_], tokens), i)
        for i, rank in enumerate(ranks)
    )
    if loads[-1][0] <= limit:
        return ranks
    ranks = [[list(bin_) for bin_ in rank] for rank in ranks]
    partner = 0
    for _ in range(_MAX_TRIALS):
        (most, most_cost, giver), (least, least_cost, taker) = loads[-1], loads[partner]
        if most <= limit or most - least < 2:
            break
        moved = _exchange(
            ranks[giver], ranks[taker], tokens, capacity, most - least, most_cost - least_cost
        )
        if moved is None:
            partner += 1
            continue
        del loads[-1], loads[partner]
        insort(loads, (most - moved[0], most_cost - moved[1], giver))
        insort(loads, (least + moved[0], least_cost + moved[1], taker))
        partner = 0
    return ranks


def _exchange(
    giver: _Rank, taker: _Rank, tokens: list[int], capacity: int, more_tokens: int, more_cost: int
) -> tuple[int, int] | None:
    """Moves a sample from `giver` to `taker`, for a shorter one or for none, so that they become as even as can be.

    Args:
        more_tokens: what `giver` holds above `taker`.
        more_cost: the same of attention, which decides between equals.

    Returns:
        Tokens and attention that moved, net; None, and nothing moved, where every exchange leaves one as full.
    """
    given = [(bin_, sample, tokens[sample]) for bin_ in giver for sample in bin_]
    taken: list[tuple[_Bin, int | None, int, int]] = []
    for bin_ in taker:
        room = capacity - sum([tokens[sample] for sample in bin_])
        taken += [(bin_, sample, tokens[sample], room) for sample in bin_]
        taken.append((bin_, None, 0, room))
    given = given[:: 1 + len(given) // _MAX_OFFERS]
    taken = taken[:: 1 + len(taken) // _MAX_OFFERS]
    longer, shorter = (
        np.array([[length] for *_, length in given]),
        np.array([length for *_, length, _ in taken]),
    )
    moved = longer - shorter  # int64 [given, taken]
    uneven = np.abs(2 * moved - more_tokens)
    uneven[moved > np.array([room for *_, room in taken])] = more_tokens
    if uneven.min() >= more_tokens:
        return None
    rows, columns = np.nonzero(uneven == uneven.min())
    moved_cost = longer[rows, 0] ** 2 - shorter[columns] ** 2
    best = int(np.abs(2 * moved_cost - more_cost).argmin())
    (from_bin, sample, _), (to_bin, other, _, _) = given[rows[best]], taken[columns[best]]
    from_bin.remove(sample)
    to_bin.append(sample)
    if other is not None:
        to_bin.remove(other)
        from_bin.append(other)
    return int(moved[rows[best], columns[best]]), int(moved_cost[best])


@dataclass(frozen=True)
class PackStats:
    """How well a step is packed."""

    pack_fill: float
    """tokens / (micro-batches x capacity)"""
    dp_imbalance: float
    """tokens of the fullest rank / mean over ranks; 1 is even"""


def pack_stats(
    lengths: Int32, micro_batches: Sequence[Sequence[Sequence[int]]], config: PackConfig
) -> PackStats:
    """Measures what `pack` returned for these lengths (int32 [samples])."""
    rank_tokens = [
        sum(int(lengths[sample]) for batch in rank for sample in batch) for rank in micro_batches
    ]
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
    assert len(input_ids) == len(loss_mask) == int(segment_lengths.sum()), (
        "lengths and tokens differ"
    )
    assert len(segment_lengths) == len(row_ids) == len(source_ids), (
        "one row and one source a segment"
    )
    assert int(segment_lengths.min()) > 0, "an empty segment"
    cu_seqlens = offsets_of(segment_lengths).astype(np.int32)
    labels = np.zeros(len(input_ids), np.int64)
    labels[:-1] = input_ids[1:]
    label_mask = np.zeros(len(input_ids), np.float32)
    label_mask[:-1] = loss_mask[1:]
    last = cu_seqlens[1:] - 1  # what follows it is another segment's
    labels[last] = 0
    label_mask[last] = 0
    position_ids = np.arange(len(input_ids), dtype=np.int64) - np.repeat(
        cu_seqlens[:-1], segment_lengths
    )
    return MicroBatch(
        input_ids=input_ids.astype(np.int64),
        labels=labels,
        position_ids=position_ids,
        loss_mask=label_mask,
        cu_seqlens=cu_seqlens,
        source_ids=np.asarray(source_ids, np.int32),
        row_ids=np.asarray(row_ids, np.int64),
    )
