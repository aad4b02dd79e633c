"""The shards of a node's data ranks: cut for a node, and there for each rank, they are the rank's."""

from __future__ import annotations

from itertools import chain

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from miles.data.packing import shards
from miles.data.packing.micro_batch import micro_batch
from miles.data.types import Chunk, MicroBatch

Lengths = list[list[list[list[int]]]]
"""[steps][data ranks][micro-batches][segments]: tokens"""


@st.composite
def lengths_of_steps(draw: st.DrawFn) -> Lengths:
    """Draw steps of as many micro-batches on every rank; some have no segment."""
    num_ranks = draw(st.integers(1, 6))
    batch = st.lists(st.integers(1, 4), max_size=3)
    steps = []
    for count in draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)):
        rank = st.lists(batch, min_size=count, max_size=count)
        steps.append(draw(st.lists(rank, min_size=num_ranks, max_size=num_ranks)))
    return steps


def chunk_of(steps: Lengths) -> Chunk:
    """Return the chunk of all ranks; ids, rows and masks tell every token and segment apart."""
    batches = list(chain.from_iterable(chain.from_iterable(steps)))
    lengths = np.array(list(chain.from_iterable(batches)), np.int32)
    num_tokens = int(lengths.sum())
    return Chunk(
        reports=(),
        data_ranks=tuple(range(len(steps[0]))),
        step_micro_batches=np.array([len(step[0]) for step in steps], np.int32),
        micro_batch_segments=np.array([len(batch) for batch in batches], np.int32),
        segment_lengths=lengths,
        segment_row_ids=np.arange(len(lengths)) + 100,
        segment_source_ids=np.arange(len(lengths), dtype=np.int32) % 3,
        input_ids=np.arange(1, num_tokens + 1, dtype=np.int32),
        loss_mask=(np.arange(num_tokens) % 5 > 1).astype(np.uint8),
    )


def expected(steps: Lengths, data_rank: int) -> list[list[MicroBatch]]:
    """Return a rank's micro-batches by step, taken one by one from the front."""
    token = segment = 0
    found: list[list[MicroBatch]] = []
    whole = chunk_of(steps)
    for step in steps:
        found.append([])
        for rank, batches in enumerate(step):
            for batch in batches:
                tokens = slice(token, token := token + sum(batch))
                segments = slice(segment, segment := segment + len(batch))
                if rank == data_rank:
                    found[-1].append(
                        micro_batch(
                            whole.input_ids[tokens],
                            whole.loss_mask[tokens],
                            whole.segment_lengths[segments],
                            whole.segment_row_ids[segments],
                            whole.segment_source_ids[segments],
                        )
                    )
    return found


def plain(batches: list[MicroBatch]) -> list[dict[str, list[float]]]:
    return [{name: array.tolist() for name, array in vars(batch).items()} for batch in batches]


@given(steps=lengths_of_steps(), data=st.data())
def test_any_node_gives_each_rank_its_own(steps: Lengths, data: st.DataObject) -> None:
    """Neighbours or not, cut from a block or from another node's chunk."""
    num_ranks = len(steps[0])
    some = st.sets(st.integers(0, num_ranks - 1), min_size=1)
    larger = sorted(data.draw(some, label="ranks of a larger part"))
    node = sorted(data.draw(st.sets(st.sampled_from(larger), min_size=1), label="ranks of a node"))
    chunk = shards.cut(shards.cut(chunk_of(steps), larger), node)

    assert chunk.data_ranks == tuple(node)
    num_tokens = 0
    for rank in node:
        taken = list(shards.micro_batches(chunk, rank))
        for batches, naive in zip(taken, expected(steps, rank), strict=True):
            assert plain(list(batches)) == plain(naive)
        for step in steps:
            num_tokens += sum(chain.from_iterable(step[rank]))
    assert len(chunk.input_ids) == num_tokens, "nothing of other ranks travels"


def test_all_ranks_are_not_copied() -> None:
    chunk = chunk_of([[[[2]], [[3, 1]], [[1]]]])
    assert shards.cut(chunk, [0, 1, 2]) is chunk
    assert np.shares_memory(shards.cut(chunk, [1, 2]).input_ids, chunk.input_ids)
