"""Sample lengths -> micro-batches of bounded size, as many on every rank, balanced over ranks.

    lengths 5 4 3 3 2 1, capacity 6, 2 ranks: 18 tokens / (2 x 6)  ->  at least 2 a rank

Longest first, each sample goes to the rank with the fewest tokens, there into the emptiest
micro-batch that holds it:

    rank 0: {5} {3,1}    rank 1: {3,2} {4}

If the fullest rank then holds too much, it exchanges samples with others: `level`.

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
from miles.data.packing.level import Bin, Rank, level
from miles.data.types import Int32

_LEVEL = 1.005
"""Exchanges stop where the fullest rank holds at most this many times what it must: the mean over
ranks, or the longest sample."""


@dataclass(frozen=True)
class _Loads:
    """Loads as single integers, which are quick to add to and to compare.

    From the highest bits to the lowest: tokens, attention, and the number of a rank or a bin.
    """

    of_samples: list[int]
    """[samples]: what each adds to a load"""
    cost_bits: int
    number_bits: int

    @classmethod
    def of(cls, tokens: list[int], num_bins: int) -> _Loads:
        """Return the loads of samples, with room for the numbers of that many bins."""
        total = sum(tokens)
        cost_bits = (total * max(tokens, default=0)).bit_length()
        number_bits = num_bins.bit_length()
        has_room = total.bit_length() + cost_bits + number_bits < 64
        lengths = np.array(tokens, np.int64 if has_room else object)
        of_samples = ((lengths << cost_bits) + lengths * lengths) << number_bits
        return cls(of_samples.tolist(), cost_bits, number_bits)

    @property
    def number_mask(self) -> int:
        return (1 << self.number_bits) - 1

    def parts(self, load: int) -> tuple[int, int, int]:
        """Return the tokens, the attention and the number of a load."""
        cost_mask = (1 << self.cost_bits) - 1
        num_tokens = load >> self.cost_bits + self.number_bits
        return num_tokens, load >> self.number_bits & cost_mask, load & self.number_mask


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

    longest_first = np.argsort(-lengths.astype(np.int64), kind="stable").tolist()
    tokens = lengths.tolist()

    # One micro-batch more on every rank, until all samples fit.
    num_micro_batches = min_micro_batches(lengths, config)
    while (ranks := _fill(longest_first, tokens, num_ranks, num_micro_batches, capacity)) is None:
        num_micro_batches += 1

    must_hold = max(-(-sum(tokens) // num_ranks), max(tokens, default=0))
    level(ranks, tokens, capacity, int(_LEVEL * must_hold))

    packed = []
    for rank in ranks:
        bins = [sorted(bin_) for bin_ in rank.bins]
        if num_micro_batches > 1:
            bins.sort(key=lambda bin_: _fullest_first(bin_, tokens))
        packed.append(bins)
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


def _fullest_first(bin_: Bin, tokens: list[int]) -> tuple[int, int, Bin]:
    """Return a key that sorts the fullest bin first."""
    lengths = [tokens[sample] for sample in bin_]
    return -sum(lengths), -sum([length * length for length in lengths]), bin_


def _fill(
    longest_first: list[int],
    tokens: list[int],
    num_ranks: int,
    num_micro_batches: int,
    capacity: int,
) -> list[Rank] | None:
    """Return ranks of `num_micro_batches` each; None if no way is found to fit all samples.

    Args:
        longest_first: the samples.
        tokens: the length of each sample.
    """
    # First way: even ranks, with all samples where they fit.
    num_bins = num_ranks * num_micro_batches
    loads = _Loads.of(tokens, num_bins)
    ranks = _fill_evenly(longest_first, tokens, loads, num_ranks, num_micro_batches, capacity)
    if ranks is not None:
        return ranks

    # Second way: as many bins as all ranks have together, filled evenly without regard to the
    # capacity, then levelled until none is above it.
    even = _spread(longest_first, loads, num_bins)
    level(even, tokens, sum(tokens), capacity)
    bins: list[Bin] | None = [rank.bins[0] for rank in even]

    # Third way: each sample where it leaves the least room.
    if max(rank.tokens for rank in even) > capacity:
        bins = _fill_tightly(longest_first, tokens, num_bins, capacity)

    return None if bins is None else _to_ranks(bins, tokens, num_ranks)


def _spread(longest_first: list[int], loads: _Loads, num_ranks: int) -> list[Rank]:
    """Put each sample on the rank with the fewest tokens, without regard to the capacity.

    Between ranks with equally many tokens, the one with the least attention comes first.

    Returns:
        Ranks of one bin each.
    """
    ranks = [Rank([[]], 0, 0) for _ in range(num_ranks)]
    bins = [rank.bins[0] for rank in ranks]
    number_mask = loads.number_mask
    heap = list(range(num_ranks))  # the loads of empty ranks
    for sample in longest_first:
        emptiest = heap[0]
        bins[emptiest & number_mask].append(sample)
        heapq.heapreplace(heap, emptiest + loads.of_samples[sample])

    for load in heap:
        num_tokens, cost, number = loads.parts(load)
        ranks[number].tokens = num_tokens
        ranks[number].cost = cost
    return ranks


def _fill_evenly(
    longest_first: list[int],
    tokens: list[int],
    loads: _Loads,
    num_ranks: int,
    num_micro_batches: int,
    capacity: int,
) -> list[Rank] | None:
    """Put each sample on the rank with the fewest tokens, there into the emptiest bin.

    A rank whose emptiest bin does not hold a sample is left out for that sample.

    Returns:
        None if a sample fits nowhere.
    """
    # A bin only grows: if all are within the capacity in the end, no rank was ever left out.
    ranks = _spread(longest_first, loads, num_ranks)
    fullest = max(rank.tokens for rank in ranks)
    if num_micro_batches > 1:
        for rank in ranks:
            bins = _spread(rank.bins[0], loads, num_micro_batches)
            rank.bins = [one_bin.bins[0] for one_bin in bins]
            fullest = max(one_bin.tokens for one_bin in bins)
            if fullest > capacity:
                break
    if fullest <= capacity:
        return ranks

    # The emptiest bin of all does not hold a sample.
    if num_ranks == 1 or num_micro_batches == 1:
        return None
    return _fill_where_it_fits(longest_first, tokens, num_ranks, num_micro_batches, capacity)


def _fill_where_it_fits(
    longest_first: list[int],
    tokens: list[int],
    num_ranks: int,
    num_micro_batches: int,
    capacity: int,
) -> list[Rank] | None:
    """Do what `_fill_evenly` does, sample by sample."""
    samples: list[list[Bin]] = [[[] for _ in range(num_micro_batches)] for _ in range(num_ranks)]
    # Heaps of (tokens, attention, number): of all ranks, and of each rank's bins.
    ranks = [(0, 0, rank) for rank in range(num_ranks)]
    bins = [[(0, 0, index) for index in range(num_micro_batches)] for _ in range(num_ranks)]

    for sample in longest_first:
        length = tokens[sample]
        full = []
        while ranks and bins[ranks[0][2]][0][0] + length > capacity:
            full.append(heapq.heappop(ranks))
        if not ranks:
            return None

        rank_tokens, rank_cost, rank = ranks[0]
        bin_tokens, bin_cost, index = bins[rank][0]
        samples[rank][index].append(sample)
        heapq.heapreplace(bins[rank], (bin_tokens + length, bin_cost + length * length, index))
        heapq.heapreplace(ranks, (rank_tokens + length, rank_cost + length * length, rank))

        for entry in full:  # a shorter sample may still fit
            heapq.heappush(ranks, entry)

    loads = sorted(ranks, key=lambda entry: entry[2])
    return [Rank(samples[rank], *load) for *load, rank in loads]


def _fill_tightly(
    longest_first: list[int], tokens: list[int], num_bins: int, capacity: int
) -> list[Bin] | None:
    """Put each sample into the fullest bin that still holds it.

    Returns:
        None if a sample fits nowhere.
    """
    samples: list[Bin] = [[] for _ in range(num_bins)]
    room = [(capacity, index) for index in range(num_bins)]  # ascending
    for sample in longest_first:
        length = tokens[sample]
        place = bisect_left(room, (length, -1))
        if place == num_bins:
            return None
        left, index = room.pop(place)
        samples[index].append(sample)
        insort(room, (left - length, index))
    return samples


def _to_ranks(bins: list[Bin], tokens: list[int], num_ranks: int) -> list[Rank]:
    """Divide bins over ranks, as many to each.

    Fullest bin first, each goes to the rank with the fewest tokens (then the least attention) that
    still lacks bins.
    """
    ranks = [Rank([], 0, 0) for _ in range(num_ranks)]
    heap = [(0, 0, number) for number in range(num_ranks)]
    fullest_first = sorted(_fullest_first(bin_, tokens) for bin_ in bins)
    for minus_tokens, minus_cost, bin_ in fullest_first:
        rank = ranks[heap[0][2]]
        rank.bins.append(bin_)
        rank.tokens -= minus_tokens
        rank.cost -= minus_cost
        if len(rank.bins) == len(bins) // num_ranks:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (rank.tokens, rank.cost, heap[0][2]))
    return ranks


@dataclass(frozen=True)
class PackStats:
    """The quality of a step's packing."""

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
    tokens = lengths.tolist()
    rank_tokens = []
    for rank in micro_batches:
        rank_tokens.append(sum([tokens[sample] for sample in chain.from_iterable(rank)]))
    total_tokens = sum(rank_tokens)
    if total_tokens == 0:
        return PackStats(pack_fill=0.0, dp_imbalance=1.0)

    num_micro_batches = sum(len(rank) for rank in micro_batches)
    return PackStats(
        pack_fill=total_tokens / (num_micro_batches * config.capacity_tokens),
        dp_imbalance=max(rank_tokens) * len(rank_tokens) / total_tokens,
    )
