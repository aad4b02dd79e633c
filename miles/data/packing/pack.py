"""Sample lengths -> micro-batches of bounded size, as many on every rank, balanced over ranks.

    lengths 5 4 3 3 2 1, capacity 6, 2 ranks: 18 tokens / (2 x 6)  ->  at least 2 a rank

Longest first, each sample goes to the rank with the fewest tokens, there into the emptiest
micro-batch that holds it:

    rank 0: {5} {3,1}    rank 1: {3,2} {4}

If the fullest rank then holds too much, it exchanges samples with others. 9 8 6 4 4 over two ranks:

    {9,4,4} {8,6}  ->  9 for 8  ->  {8,4,4} {9,6}

Packing is a pure function of the lengths. It changes no step's content, only where its samples are
computed.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from miles.data.config import PackConfig
from miles.data.types import Int32

_LEVEL = 1.005
"""Exchanges stop where the fullest rank holds at most this many times what it must: the mean over
ranks, or the longest sample."""
_MAX_TRIALS = 2_048
"""Pairs of ranks that are tried for an exchange, at most: bounds the time for very many samples."""
_MAX_OFFERS = 256
"""Samples that a rank offers in an exchange, at most; of more, every n-th."""

_Bin = list[int]
"""The samples of a micro-batch."""
_Rank = list[_Bin]
"""The micro-batches of a rank."""


def pack(lengths: Int32, config: PackConfig) -> list[list[list[int]]]:
    """Divide a step's samples over ranks and micro-batches.

    Args:
        lengths: int32 [samples], none above `config.capacity_tokens`.

    Returns:
        `[dp_rank][micro_batch]` -> indices of samples, ascending. Every rank has the same number of
        micro-batches, at least one: `min_micro_batches`, or as few more as are found to do. The
        fullest come first, so that a shortage of memory shows at once. Some are empty where there
        are too few samples.
    """
    capacity = config.capacity_tokens
    num_ranks = config.dp_size
    assert len(lengths) == 0 or int(lengths.max()) <= capacity, (
        "a sample is longer than a micro-batch"
    )
    assert len(lengths) == 0 or int(lengths.min()) > 0, "an empty sample"

    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    longest_first = list(zip(order.tolist(), lengths[order].tolist(), strict=True))
    tokens = lengths.tolist()

    # One micro-batch more on every rank, until all samples fit.
    num_micro_batches = min_micro_batches(lengths, config)
    while (ranks := _fill(longest_first, tokens, num_ranks, num_micro_batches, capacity)) is None:
        num_micro_batches += 1

    must_hold = max(-(-sum(tokens) // num_ranks), max(tokens, default=0))
    ranks = _level(ranks, tokens, capacity, int(_LEVEL * must_hold))

    packed = []
    for rank in ranks:
        bins = [sorted(bin_) for bin_ in rank]
        packed.append(sorted(bins, key=lambda bin_: _fullest_first(bin_, tokens)))
    return packed


def min_micro_batches(lengths: Int32, config: PackConfig) -> int:
    """Return a number of micro-batches a rank that no packing can be below.

    It follows from the tokens, and from the samples of over half the capacity: no two of them fit
    together.
    """
    capacity = config.capacity_tokens
    num_ranks = config.dp_size
    total_tokens = int(lengths.sum(dtype=np.int64))
    num_large = int(np.count_nonzero(2 * lengths.astype(np.int64) > capacity))
    return max(1, -(-total_tokens // (num_ranks * capacity)), -(-num_large // num_ranks))


def _load(samples: _Bin, tokens: list[int]) -> tuple[int, int]:
    """Return tokens, and the sum of squared lengths: the cost of attention."""
    lengths = [tokens[sample] for sample in samples]
    return sum(lengths), sum([length * length for length in lengths])


def _fullest_first(bin_: _Bin, tokens: list[int]) -> tuple[int, int, _Bin]:
    """Return a key that sorts the fullest bin first."""
    num_tokens, cost = _load(bin_, tokens)
    return -num_tokens, -cost, bin_


def _fill(
    longest_first: list[tuple[int, int]],
    tokens: list[int],
    num_ranks: int,
    num_micro_batches: int,
    capacity: int,
) -> list[_Rank] | None:
    """Return ranks of `num_micro_batches` each; None if no way is found to fit all samples.

    Args:
        longest_first: (sample, length).
        tokens: the length of each sample.
    """
    # First way: even ranks, with all samples where they fit.
    ranks = _fill_evenly(longest_first, num_ranks, num_micro_batches, capacity)
    if ranks is not None:
        return ranks

    # Second way: as many bins as all ranks have together, filled evenly without regard to the
    # capacity, then levelled until none is above it.
    num_bins = num_ranks * num_micro_batches
    unlimited = sum(tokens)
    even = _fill_evenly(longest_first, num_bins, 1, unlimited) or []
    level = _level(even, tokens, unlimited, capacity)
    bins: list[_Bin] | None = [bin_ for (bin_,) in level]

    # Third way: each sample where it leaves the least room.
    if max(_load(bin_, tokens)[0] for (bin_,) in level) > capacity:
        bins = _fill_tightly(longest_first, num_bins, capacity)

    return None if bins is None else _to_ranks(bins, tokens, num_ranks)


def _fill_evenly(
    longest_first: list[tuple[int, int]], num_ranks: int, num_micro_batches: int, capacity: int
) -> list[_Rank] | None:
    """Put each sample on the rank with the fewest tokens, there into the emptiest bin.

    Between ranks with equally many tokens, the one with the least attention comes first.

    Returns:
        None if a sample fits nowhere.
    """
    samples: list[_Rank] = [[[] for _ in range(num_micro_batches)] for _ in range(num_ranks)]
    # Heaps of (tokens, attention, number): of all ranks, and of each rank's bins.
    ranks = [(0, 0, rank) for rank in range(num_ranks)]
    bins = [[(0, 0, index) for index in range(num_micro_batches)] for _ in range(num_ranks)]

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


def _fill_tightly(
    longest_first: list[tuple[int, int]], num_bins: int, capacity: int
) -> list[_Bin] | None:
    """Put each sample into the fullest bin that still holds it.

    Returns:
        None if a sample fits nowhere.
    """
    samples: list[_Bin] = [[] for _ in range(num_bins)]
    room = [(capacity, index) for index in range(num_bins)]  # ascending
    for sample, length in longest_first:
        place = bisect_left(room, (length, -1))
        if place == num_bins:
            return None
        left, index = room.pop(place)
        samples[index].append(sample)
        insort(room, (left - length, index))
    return samples


def _to_ranks(bins: list[_Bin], tokens: list[int], num_ranks: int) -> list[_Rank]:
    """Divide bins over ranks, as many to each.

    Fullest bin first, each goes to the rank with the fewest tokens (then the least attention) that
    still lacks bins.
    """
    ranks: list[_Rank] = [[] for _ in range(num_ranks)]
    heap = [(0, 0, rank) for rank in range(num_ranks)]
    fullest_first = sorted(_fullest_first(bin_, tokens) for bin_ in bins)
    for minus_tokens, minus_cost, bin_ in fullest_first:
        rank_tokens, rank_cost, rank = heap[0]
        ranks[rank].append(bin_)
        if len(ranks[rank]) == len(bins) // num_ranks:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (rank_tokens - minus_tokens, rank_cost - minus_cost, rank))
    return ranks


def _level(ranks: list[_Rank], tokens: list[int], capacity: int, limit: int) -> list[_Rank]:
    """Let the fullest rank exchange samples until no rank holds more than `limit` tokens.

    Each time it exchanges with the emptiest rank that makes it less full.

    Args:
        tokens: the length of each sample.
        capacity: tokens of a micro-batch.

    Returns:
        The ranks. The fullest holds no more than before; more than `limit` if no exchange helps
        it.
    """
    # Ascending (tokens, attention, rank).
    loads = sorted(
        (*_load(list(chain.from_iterable(rank)), tokens), number)
        for number, rank in enumerate(ranks)
    )
    if loads[-1][0] <= limit:
        return ranks

    ranks = [[list(bin_) for bin_ in rank] for rank in ranks]
    partner = 0  # the position in `loads` of the rank to exchange with
    for _ in range(_MAX_TRIALS):
        most, most_cost, giver = loads[-1]
        least, least_cost, taker = loads[partner]
        if most <= limit or most - least < 2:
            break

        moved = _exchange(
            ranks[giver], ranks[taker], tokens, capacity, most - least, most_cost - least_cost
        )
        if moved is None:
            partner += 1
            continue

        moved_tokens, moved_cost = moved
        del loads[-1], loads[partner]
        insort(loads, (most - moved_tokens, most_cost - moved_cost, giver))
        insort(loads, (least + moved_tokens, least_cost + moved_cost, taker))
        partner = 0
    return ranks


def _exchange(
    giver: _Rank, taker: _Rank, tokens: list[int], capacity: int, more_tokens: int, more_cost: int
) -> tuple[int, int] | None:
    """Move a sample from `giver` to `taker`, for a shorter one or for none, to make them most even.

    Args:
        more_tokens: tokens that `giver` holds above `taker`.
        more_cost: the same of attention, which decides between equals.

    Returns:
        Tokens and attention that moved, net. None, and nothing moves, if every exchange leaves one
        of the two as full as `giver` is.
    """
    given = [(bin_, sample, tokens[sample]) for bin_ in giver for sample in bin_]
    taken: list[tuple[_Bin, int | None, int, int]] = []  # the last is the room in the bin
    for bin_ in taker:
        room = capacity - sum([tokens[sample] for sample in bin_])
        taken += [(bin_, sample, tokens[sample], room) for sample in bin_]
        taken.append((bin_, None, 0, room))
    given = given[:: 1 + len(given) // _MAX_OFFERS]
    taken = taken[:: 1 + len(taken) // _MAX_OFFERS]

    # All pairs: how uneven the two ranks are after it, where the sample fits into the bin.
    longer = np.array([[length] for *_, length in given])
    shorter = np.array([length for *_, length, _ in taken])
    rooms = np.array([room for *_, room in taken])
    moved = longer - shorter  # int64 [given, taken]
    uneven = np.abs(2 * moved - more_tokens)
    uneven[moved > rooms] = more_tokens
    if uneven.min() >= more_tokens:
        return None

    # Among the most even pairs, take the one that makes attention most even.
    rows, columns = np.nonzero(uneven == uneven.min())
    moved_cost = longer[rows, 0] ** 2 - shorter[columns] ** 2
    best = int(np.abs(2 * moved_cost - more_cost).argmin())

    from_bin, sample, _ = given[rows[best]]
    to_bin, exchanged, _, _ = taken[columns[best]]
    from_bin.remove(sample)
    to_bin.append(sample)
    if exchanged is not None:
        to_bin.remove(exchanged)
        from_bin.append(exchanged)
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
    """Measure a packing.

    Args:
        lengths: int32 [samples].
        micro_batches: the result of `pack` for them.
    """
    rank_tokens = [
        sum(int(lengths[sample]) for sample in chain.from_iterable(rank)) for rank in micro_batches
    ]
    total_tokens = sum(rank_tokens)
    if total_tokens == 0:
        return PackStats(pack_fill=0.0, dp_imbalance=1.0)

    num_micro_batches = sum(len(rank) for rank in micro_batches)
    return PackStats(
        pack_fill=total_tokens / (num_micro_batches * config.capacity_tokens),
        dp_imbalance=max(rank_tokens) * len(rank_tokens) / total_tokens,
    )
