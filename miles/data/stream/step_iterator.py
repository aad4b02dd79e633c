"""A trainer's end of the feed: an iterator over its own micro-batches, which reads ahead.

    FeedActor --fetch--> [thread: the next chunk] --> __next__: the micro-batches of step 4, 5, 6, …
              <--begin-- steps that are needed now

A rank fetches its next chunk while it computes on the one that it has. By `begin`, a rank tells the
actor that it needs a step. A rank that has to wait does so at once. Rank 0 does so for every step,
several in one call if they follow within 20 ms. (A chunk that is ready but on its way from
another node is not counted as waiting.)
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from miles.data.packing import shards
from miles.data.types import Chunk, MicroBatch, StepReport
from miles.errors import MilesError

BEGIN_SECONDS = 0.02
"""The time that rank 0 gathers steps that it has in hand before it tells the actor of them."""

StepData = tuple[StepReport, tuple[MicroBatch, ...]]
"""A step's report, and one rank's micro-batches."""


class StepIterator:
    """Iterates over a trainer's micro-batches, step by step; a thread reads ahead.

    The reports are as the stream made them. `Feed.commit` has them with what is measured when a
    step is handed out.

    Args:
        handle: `Feed.handle`.
        rank: of the trainer, among all.
        data_rank: whose data it reads.
        first_step: where it begins.
        num_steps: of the whole run; it ends there.
        node_data_ranks: of all trainers of the node, ascending: they share a chunk. None: it has
            chunks of its own.
    """

    def __init__(
        self,
        handle: Any,
        rank: int,
        data_rank: int,
        first_step: int,
        num_steps: int,
        node_data_ranks: Sequence[int] | None = None,
    ) -> None:
        self._handle = handle
        self._rank = rank
        self._data_rank = data_rank
        self._node_data_ranks = tuple(node_data_ranks or [data_rank])
        self._step = first_step
        self._num_steps = num_steps
        self._steps: Iterator[StepData] = iter(())
        self._ahead: queue.Queue[Chunk | MilesError] = queue.Queue(maxsize=1)
        self._failure: MilesError | None = None
        self._begun: queue.SimpleQueue[int] = queue.SimpleQueue()
        threading.Thread(target=self._read_ahead, args=(first_step,), daemon=True).start()
        if rank == 0 and first_step < num_steps:
            threading.Thread(target=self._tell_begun, daemon=True).start()

    def __iter__(self) -> StepIterator:
        return self

    def __next__(self) -> StepData:
        """Return the next step; wait until it is there.

        Raises:
            MilesError: why the stream ended.
        """
        if self._step >= self._num_steps:
            raise StopIteration

        following = next(self._steps, None)
        if following is None and self._ahead.empty():
            self._handle.begin.remote(self._step)
        if self._rank == 0:
            self._begun.put(self._step)
        if following is None:
            self._steps = self._next_chunk()
            following = next(self._steps)

        index = following[0].position.index
        assert index == self._step, f"asked for step {self._step}, got {index}"
        self._step += 1
        return following

    def _next_chunk(self) -> Iterator[StepData]:
        """Return the steps of the next chunk, beginning with the one that is needed."""
        chunk = self._failure or self._ahead.get()
        if isinstance(chunk, MilesError):
            self._failure = chunk
            raise chunk
        num_skipped = self._step - chunk.reports[0].position.index
        steps = zip(chunk.reports, shards.micro_batches(chunk, self._data_rank), strict=True)
        return itertools.islice(steps, num_skipped, None)

    def _tell_begun(self) -> None:
        """Tell the actor which steps are needed, several in one call where they take no time."""
        step = -1
        while step < self._num_steps - 1:
            steps = [step := self._begun.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    steps.append(step := self._begun.get_nowait())
            self._handle.begin.remote(*steps)
            time.sleep(BEGIN_SECONDS)

    def _read_ahead(self, step: int) -> None:
        """Fetch chunk after chunk, one beyond the one in use. The body of the iterator's thread."""
        try:
            while step < self._num_steps:
                (reference,) = ray.get(
                    self._handle.fetch.remote(step, self._rank, self._node_data_ranks)
                )
                chunk: Chunk = ray.get(reference)
                del reference  # or it would outlive the chunk
                step = chunk.reports[-1].position.index + 1
                self._ahead.put(chunk)
                del chunk
        except Exception as error:  # of the stream, or of an actor that is gone
            # Imported here, for `ray.data` takes a rank a second that only a failure needs.
            from miles.data.stream import pipeline

            self._ahead.put(pipeline.cause_of(error))
