"""A micro-batch on the device: its tensors, and the order in which micro-batches are sent."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from miles.data.packing.micro_batch import micro_batch
from miles.data.types import MicroBatch
from miles.train.model import long_segments
from miles.train.model.device_batch import send, send_ahead
from miles.train.parallel_layout import Layout
from tests.support.ranks import batch


def packed() -> MicroBatch:
    """Return three segments of 3, 1 and 2 tokens, the second of which cannot be trained."""
    return micro_batch(
        np.array([7, 8, 9, 4, 5, 6], np.int32),
        np.array([0, 1, 1, 1, 0, 1], np.uint8),
        np.array([3, 1, 2], np.int32),
        np.array([10, 11, 12]),
        np.array([1, 0, 1]),
    )


def test_every_array_of_a_micro_batch_is_sent() -> None:
    sent = send(packed())

    assert sent.input_ids.tolist() == [[7, 8, 9, 4, 5, 6]]
    assert sent.labels.tolist() == [[8, 9, 0, 0, 6, 0]]
    assert sent.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert sent.loss_mask.tolist() == [1, 1, 0, 0, 1, 0]
    assert sent.trained_positions.tolist() == [0, 1, 4]
    assert sent.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert sent.short_cu_seqlens.tolist() == [0, 3, 4, 6]
    assert sent.segment_of_token.tolist() == [0, 0, 0, 1, 2, 2]
    assert sent.source_of_segment.tolist() == [1, 0, 1]
    assert (sent.longest, sent.num_trained) == (3, 3)
    assert sent.host.row_ids.tolist() == [10, 11, 12]

    for tensor in (sent.input_ids, sent.trained_positions, sent.segment_of_token):
        assert tensor.dtype == torch.int64
    assert (sent.loss_mask.dtype, sent.cu_seqlens.dtype) == (torch.float32, torch.int32)


def test_short_segments_are_counted_without_the_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_segments, "LONG_TOKENS", 2)
    sent = send(packed())
    assert sent.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert sent.short_cu_seqlens.tolist() == [0, 1, 3]

    monkeypatch.setattr(long_segments, "LONG_TOKENS", 0)
    assert send(packed()).short_cu_seqlens.tolist() == [0]


def test_a_micro_batch_may_have_nothing_to_train() -> None:
    empty = np.zeros(0, np.int32)
    sent = send(micro_batch(empty, empty.astype(np.uint8), empty, empty.astype(np.int64), empty))

    assert sent.trained_positions.tolist() == []
    assert (sent.num_trained, sent.longest) == (0, 2)


def test_arrays_of_the_object_store_are_left_alone() -> None:
    source = packed()
    for array in vars(source).values():
        array.flags.writeable = False

    sent = send(source)
    sent.input_ids.zero_()
    assert source.input_ids.tolist() == [7, 8, 9, 4, 5, 6]


def test_micro_batches_are_sent_one_ahead() -> None:
    _, (micro_batches,) = batch(0, Layout(1), max_tokens=48)
    assert len(micro_batches) > 2
    taken: list[int] = []

    def watched() -> Iterator[MicroBatch]:
        for index, one in enumerate(micro_batches):
            taken.append(index)
            yield one

    handed_out = send_ahead(watched())
    assert taken == []
    for index, expected in enumerate(micro_batches):
        sent = next(handed_out)
        assert sent.input_ids[0].tolist() == expected.input_ids.tolist()
        # The next one is on its way, and no other.
        assert taken == list(range(min(index + 2, len(micro_batches))))

    assert list(handed_out) == []
