"""Ranks with samples -> the same ranks, so even that none holds more than it should.

    9 8 6 4 4 over two ranks    {9,4,4} {8,6}  ->  9 for 8  ->  {8,4,4} {9,6}

The fullest rank gives a sample and takes a shorter one, or none. `pack` fills the ranks.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

_MAX_TRIALS = 2_048
"""Pairs of ranks that are tried for an exchange, at most: bounds the time for very many samples."""
_MAX_OFFERS = 256
"""Samples that a rank offers in an exchange, at most; of more, every n-th."""

Bin = list[int]
"""The samples of a micro-batch."""


@dataclass(slots=True)
class Rank:
    """The micro-batches of a rank, while they are filled."""

    bins: list[Bin]
    tokens: int
    cost: int
    """of attention: the sum of squared lengths"""


def level(ranks: list[Rank], tokens: list[int], capacity: int, limit: int) -> None:
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

    from_bin: Bin
    given: int
    to_bin: Bin
    taken: int | None
    """None: nothing"""

    def make(self, giver: Rank, taker: Rank, tokens: list[int]) -> None:
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


def _best_exchange(giver: Rank, taker: Rank, tokens: list[int], capacity: int) -> _Exchange | None:
    """Return the exchange of a sample for a shorter one, or for none, that leaves two ranks most
    even: in tokens, then in attention, then the first in the order of the bins.

    Returns:
        None if every exchange leaves one of the two as full as `giver` is.
    """
    given = [(bin_, sample) for bin_ in giver.bins for sample in bin_]
    given = given[:: 1 + len(given) // _MAX_OFFERS]
    taken: list[tuple[Bin, int | None, int, int]] = []  # the last is the room in the bin
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
        wanted = shorter + half if half <= room else shorter + room
        place = bisect_left(lengths, wanted)
        for longer in lengths[max(place - 1, 0) : place + 1]:
            uneven = abs(2 * (longer - shorter) - more_tokens)
            if uneven > least or longer - shorter > room:
                continue
            if uneven < least:
                least = uneven
                most_even.clear()
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
