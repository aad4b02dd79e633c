"""The choice of the next token: the most likely one, or a drawn one.

    logits   / temperature   ->  the top_k largest  ->  the fewest that have top_p together  ->  one

Temperature 0 is greedy. The draw of a row depends on its own seed and the place of the token alone,
never on the rows beside it.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from miles.chat.settings import Sampling


def draws_of(seed: int, row: int) -> random.Random:
    """Return the random numbers of a row: the same whatever other rows there are."""
    return random.Random(f"{seed} {row}")  # noqa: S311  # no secret depends on it


def drawn(logits: Tensor, sampling: Sampling, number: float) -> int:
    """Return the token that a random number draws.

    Args:
        logits: float32 [vocabulary].
        number: in [0, 1).
    """
    scaled = logits.double().cpu() / sampling.temperature
    ordered, tokens = scaled.sort(descending=True, stable=True)
    if sampling.top_k:
        ordered, tokens = ordered[: sampling.top_k], tokens[: sampling.top_k]
    shares = torch.softmax(ordered, dim=-1)
    sums = shares.cumsum(dim=-1)

    # The token with which the sum comes to top_p belongs to them.
    num_kept = int((sums - shares < sampling.top_p).sum()) if sampling.top_p < 1 else len(sums)
    total = float(sums[num_kept - 1])
    assert math.isfinite(total), "logits that are not finite are refused before"
    place = int(torch.searchsorted(sums[:num_kept], number * total, right=True))
    return int(tokens[min(place, num_kept - 1)])
