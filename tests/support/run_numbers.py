"""The numbers of a few training steps, to be compared with those of another way to compute them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Numbers:
    """Losses, norms and rates, step by step."""

    losses: list[float]
    source_losses: list[tuple[float, ...]]
    grad_norms: list[float]
    rates: list[float]
    balancing_losses: list[float] = field(default_factory=list)
    """of experts; none where nothing balances them"""

    def difference(self, other: Numbers) -> float:
        """The largest, relative: of the loss, of a source's, of the norm, of the balancing loss."""
        pairs = [(self.losses, other.losses), (self.source_losses, other.source_losses)]
        pairs.append((self.grad_norms, other.grad_norms))
        if self.balancing_losses or other.balancing_losses:
            pairs.append((self.balancing_losses, other.balancing_losses))
        return max(
            float((np.abs(np.array(mine) - theirs) / np.maximum(theirs, 1e-12)).max())
            for mine, theirs in pairs
        )
