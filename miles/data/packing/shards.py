"""PACKED_STEP -> a report of each step, and the shards of some data ranks.

    a block of 3 steps, 4 ranks       [0 0 1 1 2 2 3 3] [0 1 2 3] [0 0 1 1 2 2 3 3]
    -> a chunk for ranks 2 and 3       2 2 3 3         | 2 3     | 2 2 3 3
    -> rank 3's micro-batches              3 3         |   3     |     3 3

Steps that Ray Data put into one block travel together, which makes handing them out cheap. A node
gets one chunk for all of its data ranks; each cuts its own shard where it reads it, from the shared
memory. Arrays stay as they are; only `micro_batches` shifts labels, where the rank needs them.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from miles.common.offsets import offsets_of
from miles.data.packing.micro_batch import micro_batch
from miles.data.step_schemas import PACKED_STEP
from miles.data.types import (
    STAGES,
    Chunk,
    Int32,
    Int64,
    MicroBatch,
    Step,
    StepContent,
    StepPacking,
    StepPosition,
    StepReport,
    StepRows,
    StepTiming,
    UInt8,
)

_OF_SHARDS = (
    "segment_lengths",
    "segment_row_ids",
    "segment_source_ids",
    "input_ids",
    "loss_mask",
)
_NOT_IN_REPORTS = (*_OF_SHARDS, "micro_batch_segments")
_IN_REPORTS = [field.name for field in PACKED_STEP if field.name not in _NOT_IN_REPORTS]


def reports(table: pa.Table) -> list[StepReport]:
    """Return the reports of PACKED_STEP rows."""
    lengths, starts = _values(table, "segment_lengths")
    token_starts = offsets_of(lengths)
    pair_starts = offsets_of(lengths.astype(np.int64) * (lengths + 1) // 2)

    rows = table.select(_IN_REPORTS).to_pylist()
    return [
        StepReport(
            position=StepPosition(row["step"], row["epoch"], row["next_row"]),
            rows=StepRows.from_columns(row),
            content=StepContent(
                num_samples=int(end - begin),
                num_tokens=int(token_starts[end] - token_starts[begin]),
                num_causal_pairs=int(pair_starts[end] - pair_starts[begin]),
                num_trained_tokens=row["num_trained_tokens"],
                source_trained_tokens=tuple(row["source_trained_tokens"]),
                num_straddling_tokens=row["num_straddling_tokens"],
                fingerprint=row["fingerprint"],
            ),
            packing=StepPacking(row["pack_fill"], row["dp_imbalance"]),
            timing=StepTiming({stage: row[f"{stage}_seconds"] for stage in STAGES}),
        )
        for row, (begin, end) in zip(rows, pairwise(starts), strict=True)
    ]


def whole(table: pa.Table, step_reports: Sequence[StepReport]) -> Chunk:
    """Return the shards of all data ranks of PACKED_STEP rows, without a copy.

    Args:
        step_reports: the reports of the same rows.
    """
    num_ranks = table["dp_size"][0].as_py()
    counts, batch_starts = _values(table, "micro_batch_segments")
    return Chunk(
        reports=_PickledOnce(step_reports),
        data_ranks=tuple(range(num_ranks)),
        step_micro_batches=(np.diff(batch_starts) // num_ranks).astype(np.int32),
        micro_batch_segments=counts,
        **{name: _values(table, name)[0] for name in _OF_SHARDS},
    )


class _PickledOnce(tuple[StepReport, ...]):
    """Reports that go to many nodes, and arrive as a tuple.

    Ray pickles dataclasses in Python, which takes longer than all else about a node's chunk.
    """

    @cached_property
    def _pickled(self) -> bytes:
        return pickle.dumps(tuple(self), protocol=5)

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self._pickled,)


def cut(chunk: Chunk, data_ranks: Sequence[int]) -> Chunk:
    """Return the chunk of some of a chunk's data ranks; without a copy if it has no others.

    Args:
        data_ranks: ascending.
    """
    if tuple(data_ranks) == chunk.data_ranks:
        return chunk

    # Neighbours are cut in one piece: [steps, pieces]. Step after step, as the chunk lies itself.
    pieces = np.array(_neighbours([chunk.data_ranks.index(rank) for rank in data_ranks]))
    starts = _step_starts(chunk)[:-1, None]
    counts = chunk.step_micro_batches[:, None]
    begins = (starts + counts * pieces[:, 0]).ravel()
    ends = (starts + counts * pieces[:, 1]).ravel()

    # In micro-batches, in segments, in tokens.
    segments = offsets_of(chunk.micro_batch_segments)
    tokens = offsets_of(chunk.segment_lengths)
    in_batches = _slices(begins, ends)
    in_segments = _slices(segments[begins], segments[ends])
    in_tokens = _slices(tokens[segments[begins]], tokens[segments[ends]])

    return replace(
        chunk,
        data_ranks=tuple(data_ranks),
        micro_batch_segments=_cut(chunk.micro_batch_segments, in_batches),
        segment_lengths=_cut(chunk.segment_lengths, in_segments),
        segment_row_ids=_cut(chunk.segment_row_ids, in_segments),
        segment_source_ids=_cut(chunk.segment_source_ids, in_segments),
        input_ids=_cut(chunk.input_ids, in_tokens),
        loss_mask=_cut(chunk.loss_mask, in_tokens),
    )


def chunks(table: pa.Table, step_reports: Sequence[StepReport]) -> list[Chunk]:
    """Return a chunk for each data rank of PACKED_STEP rows: [dp_size].

    Args:
        step_reports: the reports of the same rows.
    """
    all_ranks = whole(table, step_reports)
    return [cut(all_ranks, [rank]) for rank in all_ranks.data_ranks]


def micro_batches(chunk: Chunk, data_rank: int) -> Iterator[tuple[MicroBatch, ...]]:
    """Yield a data rank's micro-batches of one step after another, labels shifted."""
    segment_starts = offsets_of(chunk.micro_batch_segments)
    token_starts = offsets_of(chunk.segment_lengths)
    number = chunk.data_ranks.index(data_rank)
    counts = chunk.step_micro_batches
    begins = _step_starts(chunk)[:-1] + counts * number

    for begin, end in zip(begins, begins + counts, strict=True):
        batches = []
        for first, last in pairwise(segment_starts[begin : end + 1]):
            tokens = slice(token_starts[first], token_starts[last])
            batches.append(
                micro_batch(
                    chunk.input_ids[tokens],
                    chunk.loss_mask[tokens],
                    chunk.segment_lengths[first:last],
                    chunk.segment_row_ids[first:last],
                    chunk.segment_source_ids[first:last],
                )
            )
        yield tuple(batches)


@dataclass(frozen=True, eq=False)
class Segment:
    """One sample of a chunk, not yet shifted."""

    row_id: int
    input_ids: Int32
    """int32 [tokens]"""
    loss_mask: UInt8
    """uint8 [tokens]: whether the token is trained"""


def segments(chunk: Chunk) -> Iterator[Segment]:
    """Return the samples of a chunk, micro-batch after micro-batch of a step, rank after rank."""
    spans = pairwise(offsets_of(chunk.segment_lengths).tolist())
    for row_id, (begin, end) in zip(chunk.segment_row_ids.tolist(), spans, strict=True):
        yield Segment(row_id, chunk.input_ids[begin:end], chunk.loss_mask[begin:end])


def unpack(table: pa.Table) -> list[Step]:
    """Return PACKED_STEP rows as the steps that users hold."""
    step_reports = reports(table)
    chunk = whole(table, step_reports)
    by_rank = [micro_batches(chunk, rank) for rank in chunk.data_ranks]
    by_step = zip(*by_rank, strict=True)
    return [Step(report, ranks) for report, ranks in zip(step_reports, by_step, strict=True)]


def _step_starts(chunk: Chunk) -> Int64:
    """Return where each step begins, and the end of the last: int64 [steps + 1], micro-batches."""
    starts: Int64 = offsets_of(chunk.step_micro_batches) * len(chunk.data_ranks)
    return starts


def _neighbours(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return each run of consecutive numbers: the first, and the one behind the last."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def _values(table: pa.Table, name: str) -> tuple[Any, Int64]:
    """Return the values of a list column end to end, and int64 [rows + 1]: each row's offset."""
    column = table[name].combine_chunks()
    starts = column.offsets.to_numpy().astype(np.int64)
    values = column.values.to_numpy(zero_copy_only=False)[starts[0] : starts[-1]]
    return values, starts - starts[0]


def _slices(begins: Int64, ends: Int64) -> list[slice]:
    return list(map(slice, begins.tolist(), ends.tolist()))


def _cut(values: Any, parts: list[slice]) -> Any:
    """Return parts of an array, end to end; without a copy if there is one."""
    return values[parts[0]] if len(parts) == 1 else np.concatenate([values[part] for part in parts])
