"""The settings of answers. No torch is needed: the command line reads the defaults here."""

from __future__ import annotations

from dataclasses import dataclass

from miles.common.flags import require


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
        require(
            0 <= self.temperature <= 100,
            f"--temperature must be in [0, 100], not {self.temperature:g}",
        )
        require(0 < self.top_p <= 1, f"--top-p must be in (0, 1], not {self.top_p:g}")
        require(self.top_k >= 0, f"--top-k must not be negative: {self.top_k}")
        require(0 <= self.seed < 2**63, f"--seed must be in [0, 2**63), not {self.seed}")
        require(
            self.max_new_tokens > 0, f"--max-new-tokens must be positive, not {self.max_new_tokens}"
        )

        drawing = [
            name
            for name, is_set in (("--top-p", self.top_p < 1), ("--top-k", self.top_k > 0))
            if is_set
        ]
        require(
            self.temperature > 0 or not drawing,
            f"{' and '.join(drawing)} has no effect at --temperature 0, which always takes the most "
            "likely token: give --temperature 1, or leave it out",
        )

    @property
    def is_greedy(self) -> bool:
        """Return whether the most likely token is taken."""
        return self.temperature == 0

    def describe(self) -> str:
        """Return the settings in words, for a person."""
        if self.is_greedy:
            return "greedy"
        words = [f"temperature {self.temperature:g}"]
        words += [f"top-p {self.top_p:g}"] if self.top_p < 1 else []
        words += [f"top-k {self.top_k}"] if self.top_k else []
        return ", ".join([*words, f"seed {self.seed}"])
