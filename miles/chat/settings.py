"""The settings of answers. No torch is needed: the command line reads the flags here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from miles.common.flags import Flag, check_settings, require


@dataclass(frozen=True)
class Sampling:
    """The settings of answers."""

    temperature: Annotated[
        float,
        Flag(
            "--temperature",
            "T",
            "0 takes the most likely token; 1 draws as the model says",
            default="0",
        ),
    ] = 0.0
    top_p: Annotated[
        float,
        Flag(
            "--top-p",
            "SHARE",
            "draw from the fewest tokens that have this probability together",
            default="1, all",
        ),
    ] = 1.0
    top_k: Annotated[
        int,
        Flag(
            "--top-k",
            "TOKENS",
            "draw from the most likely ones only",
            minimum=0,
            default="0, all",
        ),
    ] = 0
    seed: Annotated[
        int, Flag("--seed", "SEED", "of the draws; the same one gives the same answers")
    ] = 0
    max_new_tokens: Annotated[
        int, Flag("--max-new-tokens", "TOKENS", "the most of an answer", minimum=1)
    ] = 512

    def __post_init__(self) -> None:
        check_settings(self)
        require(
            0 <= self.temperature <= 100,
            f"--temperature must be in [0, 100], not {self.temperature:g}",
        )
        require(0 < self.top_p <= 1, f"--top-p must be in (0, 1], not {self.top_p:g}")
        require(0 <= self.seed < 2**63, f"--seed must be in [0, 2**63), not {self.seed}")

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
