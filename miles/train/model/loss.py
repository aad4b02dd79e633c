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


def masked_sum(token_losses: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
    """What Megatron's schedule wants of a micro-batch under `calculate_per_token_loss`.

    Args:
        token_losses: float32 [1, tokens]

    Returns:
        the sum of the trained tokens' losses (to differentiate), their number (int, scalar), and, detached,
        float64 [2, segments]: each segment's loss sum and count.
    """
    losses = token_losses.reshape(-1).float()
    mask = torch.from_numpy(np.array(micro_batch.loss_mask)).to(losses.device)
    lengths = np.diff(micro_batch.cu_seqlens)
    segment_of_token = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(
        losses.device
    )
    masked = torch.where(
        mask > 0, losses, 0.0
    )  # a product would make NaN of a loss that is not trained
    by_segment = torch.zeros(2, len(lengths), dtype=torch.float64, device=losses.device)
    by_segment[0].index_add_(0, segment_of_token, masked.detach().double())
    by_segment[1].index_add_(0, segment_of_token, mask.double())
    return masked.sum(), mask.sum().to(torch.int), by_segment


def sum_by_source(by_segment: Tensor, micro_batch: MicroBatch, num_sources: int) -> Tensor:
    """float64 [2, segments] -> float64 [2 x sources]: loss sums, then token counts."""
    source_ids = torch.from_numpy(np.array(micro_batch.source_ids, np.int64)).to(by_segment.device)
    by_source = torch.zeros(2, num_sources, dtype=torch.float64, device=by_segment.device)
    return by_source.index_add_(1, source_ids, by_segment).flatten()


def rows_not_finite(by_segment: Tensor, micro_batch: MicroBatch) -> list[int]:
    """Row ids of the segments whose loss is NaN or infinite."""
    wrong = ~torch.isfinite(by_segment[0]).cpu().numpy()
    return [int(row) for row in micro_batch.row_ids[wrong]]
