"""Samples end to end: labels and masks shifted within each segment, and the dummy of an idle
rank."""

from __future__ import annotations

from itertools import chain, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from miles.data.packing.micro_batch import DUMMY_TOKENS, micro_batch
from miles.data.types import DUMMY_ROW_ID


def int32(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


def test_labels_are_shifted_within_each_segment() -> None:
    batch = micro_batch(
        int32([7, 8, 9, 5, 6, 3]),
        np.array([0, 1, 1, 1, 1, 1], np.uint8),
        int32([3, 2, 1]),
        np.array([40, 41, 42]),
        int32([0, 1, 0]),
    )

    assert batch.input_ids.tolist() == [7, 8, 9, 5, 6, 3]
    assert batch.labels.tolist() == [8, 9, 0, 6, 0, 0]
    assert batch.loss_mask.tolist() == [1, 1, 0, 1, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6]
    assert batch.row_ids.tolist() == [40, 41, 42]
    assert batch.source_ids.tolist() == [0, 1, 0]

    dtypes = {name: str(getattr(batch, name).dtype) for name in batch.__dataclass_fields__}
    assert dtypes == {
        "input_ids": "int64",
        "labels": "int64",
        "position_ids": "int64",
        "loss_mask": "float32",
        "cu_seqlens": "int32",
        "source_ids": "int32",
        "row_ids": "int64",
    }


def test_a_sample_is_the_same_packed_or_alone() -> None:
    generator = np.random.default_rng(0)
    lengths = int32([4, 1, 7])
    ids = generator.integers(0, 100, 12).astype(np.int32)
    mask = generator.integers(0, 2, 12).astype(np.uint8)
    rows = np.arange(3)
    sources = int32([0, 0, 0])

    packed = micro_batch(ids, mask, lengths, rows, sources)
    for segment, (begin, end) in enumerate(pairwise(packed.cu_seqlens.tolist())):
        this = slice(segment, segment + 1)
        alone = micro_batch(
            ids[begin:end], mask[begin:end], lengths[this], rows[this], sources[this]
        )

        for name in ("input_ids", "labels", "position_ids", "loss_mask"):
            assert getattr(packed, name)[begin:end].tolist() == getattr(alone, name).tolist()


def test_a_dummy_trains_nothing() -> None:
    batch = micro_batch(
        int32([]), np.zeros(0, np.uint8), int32([]), np.zeros(0, np.int64), int32([])
    )

    assert batch.input_ids.tolist() == [0] * DUMMY_TOKENS
    assert batch.loss_mask.sum() == 0
    assert batch.cu_seqlens.tolist() == [0, DUMMY_TOKENS]
    assert batch.position_ids.tolist() == list(range(DUMMY_TOKENS))
    assert batch.row_ids.tolist() == [DUMMY_ROW_ID]
    assert batch.source_ids.tolist() == [0]


@given(
    segments=st.lists(st.lists(st.booleans(), min_size=1, max_size=5), max_size=6),
)
def test_all_trained_tokens_but_first_ones_are_labels(segments: list[list[bool]]) -> None:
    lengths = int32([len(segment) for segment in segments])
    mask = np.array(list(chain.from_iterable(segments)), np.uint8)
    rows = np.arange(len(segments))

    batch = micro_batch(
        np.ones(len(mask), np.int32), mask, lengths, rows, int32([0] * len(segments))
    )

    assert batch.loss_mask.sum() == sum(sum(segment[1:]) for segment in segments)
