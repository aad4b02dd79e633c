"""The rules of packing, followed word for word and without haste: what `pack` must give."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

LEVEL = 1.005
MAX_TRIALS = 2_048

Ranks = list[list[list[int]]]
"""[rank][micro-batch]: samples"""


def packed_by_the_rules(lengths: Sequence[int], num_ranks: int, capacity: int) -> Ranks:
    """Pack samples as the docstring of `pack` says."""
    longest_first = sorted(range(len(lengths)), key=lambda sample: -lengths[sample])
    num_large = sum(2 * length > capacity for length in lengths)
    num_batches = max(1, -(-sum(lengths) // (num_ranks * capacity)), -(-num_large // num_ranks))
    while (ranks := _fill(longest_first, lengths, num_ranks, num_batches, capacity)) is None:
        num_batches += 1

    must_hold = max(-(-sum(lengths) // num_ranks), max(lengths, default=0))
    _level(ranks, lengths, capacity, int(LEVEL * must_hold))
    packed = []
    for rank in ranks:
        bins = [sorted(samples) for samples in rank]
        packed.append(sorted(bins, key=lambda samples: _fullest_first(samples, lengths)))
    return packed


def _load(samples: Sequence[int], lengths: Sequence[int]) -> tuple[int, int]:
    """Return tokens and attention."""
    chosen = [lengths[sample] for sample in samples]
    return sum(chosen), sum(length**2 for length in chosen)


def _rank_load(rank: list[list[int]], lengths: Sequence[int]) -> tuple[int, int]:
    return _load(list(chain.from_iterable(rank)), lengths)


def _fullest_first(samples: list[int], lengths: Sequence[int]) -> tuple[int, int, list[int]]:
    tokens, attention = _load(samples, lengths)
    return -tokens, -attention, samples


def _fill(
    longest_first: list[int],
    lengths: Sequence[int],
    num_ranks: int,
    num_batches: int,
    capacity: int,
) -> Ranks | None:
    """Fill evenly; or all bins evenly and level them; or each bin as full as can be."""
    ranks = _evenly(longest_first, lengths, num_ranks, num_batches, capacity)
    if ranks is not None:
        return ranks

    unlimited = sum(lengths)
    single = _evenly(longest_first, lengths, num_ranks * num_batches, 1, unlimited)
    assert single is not None
    _level(single, lengths, unlimited, capacity)
    bins = [samples for (samples,) in single]
    if max(_load(samples, lengths)[0] for samples in bins) > capacity:
        bins = [[] for _ in bins]
        for sample in longest_first:
            fitting = []
            for number, samples in enumerate(bins):
                room = capacity - _load(samples, lengths)[0]
                if lengths[sample] <= room:
                    fitting.append((room, number))
            if not fitting:
                return None
            bins[min(fitting)[1]].append(sample)

    ranks = [[] for _ in range(num_ranks)]
    for samples in sorted(bins, key=lambda samples: _fullest_first(samples, lengths)):
        open_ranks = [rank for rank in ranks if len(rank) < num_batches]
        min(open_ranks, key=lambda rank: _rank_load(rank, lengths)).append(samples)
    return ranks


def _evenly(
    longest_first: list[int],
    lengths: Sequence[int],
    num_ranks: int,
    num_batches: int,
    capacity: int,
) -> Ranks | None:
    """Put each sample on the emptiest rank whose emptiest bin holds it, into that bin."""
    ranks: Ranks = [[[] for _ in range(num_batches)] for _ in range(num_ranks)]
    for sample in longest_first:
        for rank in sorted(ranks, key=lambda rank: _rank_load(rank, lengths)):
            emptiest = min(rank, key=lambda samples: _load(samples, lengths))
            if _load(emptiest, lengths)[0] + lengths[sample] <= capacity:
                emptiest.append(sample)
                break
        else:
            return None
    return ranks


def _level(ranks: Ranks, lengths: Sequence[int], capacity: int, limit: int) -> None:
    """Let the fullest rank exchange samples with the emptiest one that helps, again and again."""
    partner = 0
    for _ in range(MAX_TRIALS):
        ascending = sorted(ranks, key=lambda rank: _rank_load(rank, lengths))
        giver, taker = ascending[-1], ascending[partner]
        more_tokens = _rank_load(giver, lengths)[0] - _rank_load(taker, lengths)[0]
        if _rank_load(giver, lengths)[0] <= limit or more_tokens < 2:
            return
        partner = 0 if _exchange(giver, taker, lengths, capacity) else partner + 1


def _exchange(
    giver: list[list[int]], taker: list[list[int]], lengths: Sequence[int], capacity: int
) -> bool:
    """Try all pairs, and exchange the best; return whether there is one."""
    tokens, attention = _rank_load(giver, lengths)
    other_tokens, other_attention = _rank_load(taker, lengths)
    more_tokens, more_attention = tokens - other_tokens, attention - other_attention

    best = None
    given = [(samples, sample) for samples in giver for sample in samples]
    taken = [(samples, sample) for samples in taker for sample in [*samples, None]]
    for samples, sample in given:
        for other_samples, other in taken:
            longer, shorter = lengths[sample], 0 if other is None else lengths[other]
            room = capacity - _load(other_samples, lengths)[0]
            uneven = abs(2 * (longer - shorter) - more_tokens)
            if longer - shorter > room or uneven >= more_tokens:
                continue
            key = uneven, abs(2 * (longer**2 - shorter**2) - more_attention)
            if best is None or key < best[0]:
                best = key, samples, sample, other_samples, other

    if best is None:
        return False
    _, samples, sample, other_samples, other = best
    samples.remove(sample)
    other_samples.append(sample)
    if other is not None:
        other_samples.remove(other)
        samples.append(other)
    return True
