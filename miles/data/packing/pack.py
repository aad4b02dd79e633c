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
from bisect import bisect_left, bisect_right, insort
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


@dataclass(slots=True)
class _Rank:
    """The micro-batches of a rank, while they are filled."""

    bins: list[_Bin]
    tokens: int
    cost: int
    """of attention: the sum of squared lengths"""


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
    _level(ranks, tokens, capacity, int(_LEVEL * must_hold))

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


def _load(samples: _Bin, tokens: list[int]) -> tuple[int, int]:
    """Return tokens, and the sum of squared lengths: the cost of attention."""
    lengths = [tokens[sample] for sample in samples]
    return sum(lengths), sum([length * length for length in lengths])


def _fullest_first(bin_: _Bin, tokens: list[int]) -> tuple[int, int, _Bin]:
    """Return a key that sorts the fullest bin first."""
    num_tokens, cost = _load(bin_, tokens)
    return -num_tokens, -cost, bin_


def _fill(
    longest_first: list[int],
    tokens: list[int],
    num_ranks: int,
    num_micro_batches: int,
    capacity: int,
) -> list[_Rank] | None:
    """Return ranks of `num_micro_batches` each; None if no way is found to fit all samples.

    Args:
        longest_first: the samples.
        tokens: the length of each sample.
    """
    # First way: even ranks, with all samples where they fit.
    ranks = _fill_evenly(longest_first, tokens, num_ranks, num_micro_batches, capacity)
    if ranks is not None:
        return ranks

    # Second way: as many bins as all ranks have together, filled evenly without regard to the
    # capacity, then levelled until none is above it.
    num_bins = num_ranks * num_micro_batches
    even = _spread(longest_first, tokens, num_bins)
    _level(even, tokens, sum(tokens), capacity)
    bins: list[_Bin] | None = [rank.bins[0] for rank in even]

    # Third way: each sample where it leaves the least room.
    if max(rank.tokens for rank in even) > capacity:
        bins = _fill_tightly(longest_first, tokens, num_bins, capacity)

    return None if bins is None else _to_ranks(bins, tokens, num_ranks)


def _spread(longest_first: list[int], tokens: list[int], num_ranks: int) -> list[_Rank]:
    """Put each sample on the rank with the fewest tokens, without regard to the capacity.

    Between ranks with equally many tokens, the one with the least attention comes first.

    Returns:
        Ranks of one bin each.
    """
    ranks: list[_Bin] = [[] for _ in range(num_ranks)]
    lengths = [tokens[sample] for sample in longest_first]

    # A load is one integer, which is quick to add to and to compare: tokens, attention, number.
    number_bits = num_ranks.bit_length()
    cost_bits = (sum(lengths) * max(lengths, default=0)).bit_length()
    one_token = 1 << (cost_bits + number_bits)
    number_mask = (1 << number_bits) - 1
    added = [length * (one_token + (length << number_bits)) for length in lengths]

    loads = list(range(num_ranks))  # a heap
    for sample, load in zip(longest_first, added, strict=True):
        emptiest = loads[0]
        ranks[emptiest & number_mask].append(sample)
        heapq.heapreplace(loads, emptiest + load)

    cost_mask = (1 << cost_bits) - 1
    filled = [_Rank([bin_], 0, 0) for bin_ in ranks]
    for load in loads:
        rank = filled[load & number_mask]
        rank.tokens = load >> (cost_bits + number_bits)
        rank.cost = (load >> number_bits) & cost_mask
    return filled


def _fill_evenly(
    longest_first: list[int],
    tokens: list[int],
    num_ranks: int,
    num_micro_batches: int,
    capacity: int,
) -> list[_Rank] | None:
    """Put each sample on the rank with the fewest tokens, there into the emptiest bin.

    A rank whose emptiest bin does not hold a sample is left out for that sample.

    Returns:
        None if a sample fits nowhere.
    """
    # A bin only grows: if all are within the capacity in the end, no rank was ever left out.
    ranks = _spread(longest_first, tokens, num_ranks)
    fullest = max(rank.tokens for rank in ranks)
    if num_micro_batches > 1:
        for rank in ranks:
            bins = _spread(rank.bins[0], tokens, num_micro_batches)
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
) -> list[_Rank] | None:
    """Do what `_fill_evenly` does, sample by sample."""
    samples: list[list[_Bin]] = [[[] for _ in range(num_micro_batches)] for _ in range(num_ranks)]
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
    return [_Rank(samples[rank], *load) for *load, rank in loads]


def _fill_tightly(
    longest_first: list[int], tokens: list[int], num_bins: int, capacity: int
) -> list[_Bin] | None:
    """Put each sample into the fullest bin that still holds it.

    Returns:
        None if a sample fits nowhere.
    """
    samples: list[_Bin] = [[] for _ in range(num_bins)]
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


def _to_ranks(bins: list[_Bin], tokens: list[int], num_ranks: int) -> list[_Rank]:
    """Divide bins over ranks, as many to each.

    Fullest bin first, each goes to the rank with the fewest tokens (then the least attention) that
    still lacks bins.
    """
    ranks = [_Rank([], 0, 0) for _ in range(num_ranks)]
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


def _level(ranks: list[_Rank], tokens: list[int], capacity: int, limit: int) -> None:
    """Let the fullest rank exchange samples until no rank holds more than `limit` tokens.

    Each time it exchanges with the emptiest rank that makes it less full. If no exchange helps it,
    it keeps more than `limit`.

    Args:
        ranks: are changed.
        tokens: the length of each sample.
        capacity: tokens of a micro-batch.
    """
    if max(rank.tokens for rank in ranks) <= limit:
        return

    # Ascending (tokens, attention, rank).
    loads = sorted((rank.tokens, rank.cost, number) for number, rank in enumerate(ranks))
    partner = 0  # the position in `loads` of the rank to exchange with
    for _ in range(_MAX_TRIALS):
        giver = ranks[loads[-1][2]]
        taker = ranks[loads[partner][2]]
        if giver.tokens <= limit or giver.tokens - taker.tokens < 2:
            break
        exchange = _best_exchange(giver, taker, tokens, capacity)
        if exchange is None:
            partner += 1
            continue

        exchange.make(giver, taker, tokens)
        fullest, emptiest = loads.pop(), loads.pop(partner)
        insort(loads, (giver.tokens, giver.cost, fullest[2]))
        insort(loads, (taker.tokens, taker.cost, emptiest[2]))
        partner = 0


@dataclass(frozen=True)
class _Exchange:
    """A sample of one rank, and what another one gives for it."""

    from_bin: _Bin
    given: int
    to_bin: _Bin
    taken: int | None
    """None: nothing"""

    def make(self, giver: _Rank, taker: _Rank, tokens: list[int]) -> None:
        """Let the sample go from `giver` to `taker`."""
        self.from_bin.remove(self.given)
        self.to_bin.append(self.given)
        longer, shorter = tokens[self.given], 0
        if self.taken is not None:
            self.to_bin.remove(self.taken)
            self.from_bin.append(self.taken)
            shorter = tokens[self.taken]

        giver.tokens -= longer - shorter
        taker.tokens += longer - shorter
        giver.cost -= longer**2 - shorter**2
        taker.cost += longer**2 - shorter**2


def _best_exchange(
    giver: _Rank, taker: _Rank, tokens: list[int], capacity: int
) -> _Exchange | None:
    """Return the exchange of a sample for a shorter one, or for none, that leaves two ranks most
    even: in tokens, then in attention, then the first in the order of the bins.

    Returns:
        None if every exchange leaves one of the two as full as `giver` is.
    """
    given = [(bin_, sample) for bin_ in giver.bins for sample in bin_]
    given = given[:: 1 + len(given) // _MAX_OFFERS]
    taken: list[tuple[_Bin, int | None, int, int]] = []  # the last is the room in the bin
    for bin_ in taker.bins:
        room = capacity - sum([tokens[sample] for sample in bin_])
        taken += [(bin_, sample, tokens[sample], room) for sample in bin_]
        taken.append((bin_, None, 0, room))
    taken = taken[:: 1 + len(taken) // _MAX_OFFERS]

    more_tokens = giver.tokens - taker.tokens
    more_cost = giver.cost - taker.cost
    half = (more_tokens + 1) // 2
    ascending = sorted([(tokens[sample], place) for place, (_, sample) in enumerate(given)])
    lengths = [length for length, _ in ascending]

    # For a shorter sample, the best of those that fit is the first that is longer by half of what
    # the ranks differ by, or the one before it.
    least = more_tokens
    most_even: list[tuple[int, int]] = []
    for column, (_, _, shorter, room) in enumerate(taken):
        num_fitting = bisect_right(lengths, shorter + room)
        place = bisect_left(lengths, shorter + half, 0, num_fitting)
        for longer in lengths[max(place - 1, 0) : min(place + 1, num_fitting)]:
            uneven = abs(2 * (longer - shorter) - more_tokens)
            if uneven < least:
                least = uneven
                most_even.clear()
            if uneven == least:
                most_even.append((longer, column))
    if least == more_tokens:
        return None

    ranked = []
    for longer, column in most_even:
        moved_cost = longer**2 - taken[column][2] ** 2
        row = ascending[bisect_left(lengths, longer)][1]
        ranked.append((abs(2 * moved_cost - more_cost), row, column))
    _, row, column = min(ranked)
    return _Exchange(*given[row], *taken[column][:2])


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
