"""How the next token is chosen: the most likely one, or a drawn one.

    logits   / temperature   ->  the top_k largest  ->  the fewest that have top_p together  ->  one

Temperature 0 is greedy. The draw of a row depends on its own seed and the place of the token alone,
never on the rows beside it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from miles.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """The settings of answers."""

    temperature: float = 0.0
    """0: the most likely token"""
    top_p: float = 1.0
    """draw from the fewest tokens that have this probability together"""
    top_k: int = 0
    """draw from this many tokens, the most likely; 0: from all"""
    seed: int = 0
    max_new_tokens: int = 512
    """of an answer"""

    def __post_init__(self) -> None:
        _require(
            0 <= self.temperature <= 100,
            f"--temperature must be in [0, 100], not {self.temperature:g}",
        )
        _require(0 < self.top_p <= 1, f"--top-p must be in (0, 1], not {self.top_p:g}")
        _require(self.top_k >= 0, f"--top-k must not be negative: {self.top_k}")
        _require(0 <= self.seed < 2**63, f"--seed must be in [0, 2**63), not {self.seed}")
        _require(
            self.max_new_tokens > 0, f"--max-new-tokens must be positive, not {self.max_new_tokens}"
        )
        drawing = [
            name
            for name, is_set in (("--top-p", self.top_p < 1), ("--top-k", self.top_k > 0))
            if is_set
        ]
        _require(
            self.temperature > 0 or not drawing,
            f"{' and '.join(drawing)} has no effect at --temperature 0, which always takes the most "
            "likely token: give --temperature 1, or leave it out",
        )

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0

    def describe(self) -> str:
        """Return the settings in words, for a person."""
        if self.is_greedy:
            return "greedy"
        words = [f"temperature {self.temperature:g}"]
        words += [f"top-p {self.top_p:g}"] if self.top_p < 1 else []
        words += [f"top-k {self.top_k}"] if self.top_k else []
        return ", ".join([*words, f"seed {self.seed}"])


def _require(is_met: bool, text: str) -> None:
    if not is_met:
        raise ConfigError(text)


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
