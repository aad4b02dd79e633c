"""Padding of a micro-batch for sequence parallelism."""

from __future__ import annotations

from miles.train.model.packed_forward import pad_for_tensor_ranks
from miles.train.parallel_layout import Layout
from tests.support.ranks import batch


def test_padding_is_an_untrained_last_segment() -> None:
    _, (micro_batches,) = batch(0, Layout(1), max_tokens=64)
    layout = Layout(16, tensor=16, sequence_parallel=True)

    for before in micro_batches:
        after = pad_for_tensor_ranks(before, layout)
        num_tokens = len(after.input_ids)
        assert num_tokens % 16 == 0
        assert after.cu_seqlens[-1] == num_tokens == len(after.labels) == len(after.position_ids)
        assert after.loss_mask.sum() == before.loss_mask.sum()
        assert after.input_ids[: len(before.input_ids)].tolist() == before.input_ids.tolist()
        assert len(after.row_ids) == len(after.source_ids) == len(after.cu_seqlens) - 1


def test_without_sequence_parallelism_nothing_is_padded() -> None:
    _, (micro_batches,) = batch(0, Layout(1), max_tokens=64)
    layout = Layout(16, tensor=16)
    assert pad_for_tensor_ranks(micro_batches[0], layout) is micro_batches[0]
