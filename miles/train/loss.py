"""The loss: a sum over all trained tokens of the global batch, divided by their number, once.

Two ranks, the first with 1 trained token of loss 4, the second with 3 of loss 2: the loss is
(4 + 2 + 2 + 2) / 4 = 2.5, not the mean of the ranks' means, 3. Nobody divides before everybody has added.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from miles.data.types import MicroBatch


@dataclass(frozen=True)
class SourceSums:
    """Sums of the loss and counts of the trained tokens, for each source."""

    vector: Tensor
    """float64 [2 x sources]: loss sums, then token counts"""

    def all_reduce(self, group: object) -> None:
        torch.distributed.all_reduce(self.vector, group=group)

    @property
    def losses(self) -> list[float]:
        return self.vector[: len(self.vector) // 2].tolist()

    @property
    def tokens(self) -> list[int]:
        return [int(count) for count in self.vector[len(self.vector) // 2 :].tolist()]


def masked_sum(token_losses: Tensor, micro_batch: MicroBatch, num_sources: int) -> tuple[Tensor, Tensor, Tensor]:
    """What Megatron's schedule wants of a micro-batch under `calculate_per_token_loss`.

    Args:
        token_losses: float32 [1, tokens]

    Returns:
        the sum of the trained tokens' losses (to differentiate), their number (int, scalar), and, detached,
        float64 [2 x sources]: loss sums and counts by source.
    """
    losses = token_losses.reshape(-1).float()
    mask = torch.from_numpy(np.array(micro_batch.loss_mask)).to(losses.device)
    lengths = np.diff(micro_batch.cu_seqlens)
    source_of_token = torch.from_numpy(np.repeat(micro_batch.source_ids, lengths).astype(np.int64)).to(losses.device)
    masked = losses * mask
    by_source = torch.zeros(2 * num_sources, dtype=torch.float64, device=losses.device)
    by_source.index_add_(0, source_of_token, masked.detach().double())
    by_source.index_add_(0, source_of_token + num_sources, mask.double())
    return masked.sum(), mask.sum().to(torch.int), by_source
