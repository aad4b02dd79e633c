"""The loss: a sum over all trained tokens of the global batch, divided once by their number.

Two ranks, the first with 1 trained token of loss 4, the second with 3 of loss 2: the loss is
(4 + 2 + 2 + 2) / 4 = 2.5, not the mean of the ranks' means, 3. No rank divides before all ranks
have added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miles.data.types import MicroBatch
from miles.train.model.device import torch_device
from miles.train.model.device_batch import DeviceBatch
from miles.train.model.output_loss import TokenLosses


@dataclass(frozen=True)
class SourceSums:
    """Sums of the loss and counts of the trained tokens, for each source.

    Others may travel with them, such as the loads of experts (`router_loads`).
    """

    vector: Tensor
    """float64 [2 x sources + others]: loss sums, then token counts, then what is added up beside
    them"""
    num_sources: int

    @classmethod
    def zeros(cls, num_sources: int) -> SourceSums:
        vector = torch.zeros(2 * num_sources, dtype=torch.float64, device=torch_device())
        return cls(vector, num_sources)

    def beside(self, others: Tensor) -> SourceSums:
        """Return the sums with others behind them, float64 [others]."""
        return SourceSums(torch.cat([self.vector, others]), self.num_sources)

    def on_host(self) -> SourceSums:
        """Return a copy on the host. This waits for the device."""
        return SourceSums(self.vector.cpu(), self.num_sources)

    def all_reduce(self, group: object) -> None:
        """Replace the sums by those over all ranks of a process group."""
        torch.distributed.all_reduce(self.vector, group=group)

    @property
    def losses(self) -> list[float]:
        return self.vector[: self.num_sources].tolist()

    @property
    def tokens(self) -> list[int]:
        counts = self.vector[self.num_sources : 2 * self.num_sources]
        return [int(count) for count in counts.tolist()]

    @property
    def others(self) -> Tensor:
        """Return what was added up beside them."""
        return self.vector[2 * self.num_sources :]


@dataclass(frozen=True)
class MicroBatchSums:
    """Sums of the loss and counts of the trained tokens of one micro-batch."""

    by_segment: Tensor
    """float64 [2, segments]: loss sums, then token counts"""
    by_source: Tensor
    """float64 [2 x sources]: loss sums, then token counts"""


def masked_sum(losses: TokenLosses, batch: DeviceBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of a micro-batch as Megatron's `calculate_per_token_loss` wants it.

    Returns:
        the sum of the trained tokens' losses, to differentiate; the number of trained tokens (int,
        scalar, on the host); and, detached, each segment's loss sum and count, float64
        [2, segments].
    """
    values = torch.stack([losses.of_tokens, torch.ones_like(losses.of_tokens)]).double()
    segments = batch.segment_of_token.index_select(0, batch.trained_positions)
    by_segment = values.new_zeros(2, len(batch.source_of_segment))
    by_segment.index_add_(1, segments, values)
    return losses.total, torch.tensor(batch.num_trained, dtype=torch.int), by_segment


def sum_by_source(by_segment: Tensor, batch: DeviceBatch, num_sources: int) -> Tensor:
    """Add up float64 [2, segments] to float64 [2 x sources]: loss sums, then token counts."""
    by_source = torch.zeros(2, num_sources, dtype=torch.float64, device=by_segment.device)
    return by_source.index_add_(1, batch.source_of_segment, by_segment).flatten()


def rows_not_finite(by_segment: Tensor, micro_batch: MicroBatch) -> list[int]:
    """Return the row ids of the segments whose loss is NaN or infinite."""
    is_finite = torch.isfinite(by_segment[0]).cpu().numpy()
    row_ids: list[int] = micro_batch.row_ids[~is_finite].tolist()
    return row_ids
