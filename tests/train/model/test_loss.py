"""The loss of a micro-batch: sums over trained tokens, by segment and by source."""

from __future__ import annotations

import numpy as np
import torch

from miles.train.model.device_batch import send
from miles.train.model.loss import SourceSums, masked_sum, rows_not_finite, sum_by_source
from miles.train.model.output_loss import TokenLosses
from miles.train.parallel_layout import Layout
from tests.support.ranks import NUM_SOURCES, batch


def test_losses_add_up_to_their_segments() -> None:
    _, (micro_batches,) = batch(0, Layout(1), max_tokens=4096)
    sent = send(micro_batches[0])
    losses = torch.arange(sent.num_trained).float()
    losses[0] = float("nan")

    total, count, by_segment = masked_sum(TokenLosses(losses.sum(), losses), sent)

    expected = np.zeros(sent.host.loss_mask.shape)
    expected[sent.host.loss_mask > 0] = losses.numpy()
    starts = sent.host.cu_seqlens[:-1]
    np.testing.assert_array_equal(by_segment[0], np.add.reduceat(expected, starts))
    np.testing.assert_array_equal(by_segment[1], np.add.reduceat(sent.host.loss_mask, starts))
    assert count == sent.host.loss_mask.sum()
    assert total.isnan()
    first = int(sent.host.loss_mask.argmax())
    row = int(np.searchsorted(sent.host.cu_seqlens, first, side="right")) - 1
    assert rows_not_finite(by_segment, sent.host) == [sent.host.row_ids[row]]


def test_segments_add_up_to_their_sources() -> None:
    _, (micro_batches,) = batch(0, Layout(1), max_tokens=4096)
    micro_batch = micro_batches[0]
    num_segments = len(micro_batch.source_ids)
    by_segment = torch.stack(
        [torch.arange(num_segments).double(), torch.ones(num_segments).double()]
    )

    by_source = sum_by_source(by_segment, send(micro_batch), NUM_SOURCES)
    sums = SourceSums(by_source, NUM_SOURCES).beside(torch.ones(3).double())

    assert sums.others.tolist() == [1.0] * 3
    for source in range(NUM_SOURCES):
        segments = [index for index, of in enumerate(micro_batch.source_ids) if of == source]
        assert sums.losses[source] == sum(segments)
        assert sums.tokens[source] == len(segments)


def test_rows_with_infinite_loss_are_named() -> None:
    _, (micro_batches,) = batch(0, Layout(1), max_tokens=4096)
    micro_batch = micro_batches[0]
    by_segment = torch.ones(2, len(micro_batch.row_ids), dtype=torch.float64)
    by_segment[0, 1] = float("inf")
    by_segment[0, 3] = float("nan")

    assert rows_not_finite(by_segment, micro_batch) == micro_batch.row_ids[[1, 3]].tolist()
