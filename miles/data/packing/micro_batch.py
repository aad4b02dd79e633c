"""A micro-batch of samples, end to end -> arrays for the model, labels shifted in each segment.

    ids          7 8 9 | 5 6     mask of tokens       0 1 1 | 0 1
    labels       8 9 0 | 6 0     mask of positions    1 1 0 | 1 0
    position_ids 0 1 2 | 0 1     cu_seqlens           0 3 5

This alone turns the mask of *tokens* that are trained into a mask of *positions* whose label (the
next token of the same segment) is trained.
"""

from __future__ import annotations

import numpy as np

from miles.common.offsets import offsets_of
from miles.data.types import DUMMY_ROW_ID, Int32, Int64, MicroBatch, UInt8

DUMMY_TOKENS = 2
"""Length of the segment in a micro-batch that only keeps a rank in step."""


def micro_batch(
    input_ids: Int32, loss_mask: UInt8, segment_lengths: Int32, row_ids: Int64, source_ids: Int32
) -> MicroBatch:
    """Return a micro-batch of samples that lie end to end.

    Without samples it is a dummy: one segment of `DUMMY_TOKENS` tokens of id 0, none of them
    trained.

    Args:
        input_ids: int32 [tokens]
        loss_mask: uint8 [tokens]: whether the token is trained
        segment_lengths: int32 [segments], all positive
        row_ids: int64 [segments]
        source_ids: int32 [segments]
    """
    if len(segment_lengths) == 0:
        input_ids = np.zeros(DUMMY_TOKENS, np.int32)
        loss_mask = np.zeros(DUMMY_TOKENS, np.uint8)
        segment_lengths = np.array([DUMMY_TOKENS], np.int32)
        row_ids = np.array([DUMMY_ROW_ID], np.int64)
        source_ids = np.zeros(1, np.int32)  # a valid index; its mask adds nothing to that source

    num_tokens = len(input_ids)
    assert num_tokens == len(loss_mask) == int(segment_lengths.sum()), "lengths and tokens differ"
    assert len(segment_lengths) == len(row_ids) == len(source_ids), (
        "one row and one source a segment"
    )
    assert int(segment_lengths.min()) > 0, "an empty segment"

    cu_seqlens = offsets_of(segment_lengths).astype(np.int32)
    position_ids = np.arange(num_tokens, dtype=np.int64)
    position_ids -= np.repeat(cu_seqlens[:-1], segment_lengths)

    # The label of a position is the next token. The last of a segment has none: what follows it
    # belongs to another segment.
    labels = np.zeros(num_tokens, np.int64)
    labels[:-1] = input_ids[1:]
    label_mask = np.zeros(num_tokens, np.float32)
    label_mask[:-1] = loss_mask[1:]
    last = cu_seqlens[1:] - 1
    labels[last] = 0
    label_mask[last] = 0

    return MicroBatch(
        input_ids=input_ids.astype(np.int64),
        labels=labels,
        position_ids=position_ids,
        loss_mask=label_mask,
        cu_seqlens=cu_seqlens,
        source_ids=np.asarray(source_ids, np.int32),
        row_ids=np.asarray(row_ids, np.int64),
    )
