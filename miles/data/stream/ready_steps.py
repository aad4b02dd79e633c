"""The steps that are ready for the ranks: plain state, without threads, clocks or Ray.

    call             what happens                                   newest  needed  ready
    put(4, 5, 6, 7)  a block of the stream comes as one chunk          7       3      4
    begin(4)         a rank needs step 4: the queue depth is 4         7       4      3
    fetch(4)         each rank takes the chunk                         7       4      3
    begin(8)         nothing is ready: depth 0, the rank waits         7       8      0
    put(8, 9)        step 8 is measured, with its wait; the first
                     chunk is released, if every rank fetched it       9       8      1

The bound: the next block is taken while fewer than `max_ready_steps` steps are ready. A step is
measured when it is first needed, by any rank: its queue depth is the number of ready steps,
itself included, and counted up to `max_ready_steps`. It is 0 exactly when a rank had to wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from miles.data.types import StepReport
from miles.errors import LostError, MilesError, RunError


@dataclass
class _HeldChunk:
    """Steps that travel together, until every rank has fetched them."""

    first_step: int
    last_step: int
    content: Any
    fetched_by: set[int]


class ReadySteps:
    """The account of the steps that are ready, needed and waited for. Requests are idempotent.

    Args:
        first_step: the step that comes first.
        num_ranks: ranks that fetch every chunk.
        max_ready_steps: no block is taken while as many steps are ready.
        max_ahead_steps: how far beyond the needed step a window may be loaded.
    """

    def __init__(
        self, first_step: int, num_ranks: int, *, max_ready_steps: int, max_ahead_steps: int
    ) -> None:
        self._num_ranks = num_ranks
        self._max_ready_steps = max_ready_steps
        self._max_ahead_steps = max_ahead_steps
        self._newest = first_step - 1  # the newest step that the stream gave
        self._needed = first_step - 1  # the newest step that a rank needed
        self._chunks: list[_HeldChunk] = []
        self._reports: dict[int, StepReport] = {}  # until committed
        self._measured: set[int] = set()  # of the steps in `_reports`
        self._waiting_since: dict[int, float] = {}  # step -> when a rank began to wait for it
        self._end: MilesError | None = None  # why no step comes after the newest

    @property
    def newest(self) -> int:
        """The newest step that the stream gave."""
        return self._newest

    @property
    def held_steps(self) -> list[tuple[int, int]]:
        """The first and last step of each chunk that is held."""
        return [(chunk.first_step, chunk.last_step) for chunk in self._chunks]

    @property
    def has_room(self) -> bool:
        """True if the next block may be taken."""
        return self._newest - self._needed < self._max_ready_steps

    def may_load(self, first_step: int) -> bool:
        """Return whether a window that begins with this step is near enough to be loaded."""
        return first_step <= self._needed + self._max_ahead_steps

    def put(self, reports: Sequence[StepReport], content: Any, now: float) -> None:
        """Take the next block of the stream.

        Args:
            reports: of its steps, which follow the newest.
            content: handed out by `fetch`.
            now: seconds of a steady clock.
        """
        first = reports[0].position.index
        last = reports[-1].position.index
        assert first == self._newest + 1, f"step {first} came after step {self._newest}"
        self._chunks.append(_HeldChunk(first, last, content, set()))
        self._newest = last
        self._reports.update((report.position.index, report) for report in reports)

        for step in [step for step in self._waiting_since if step <= last]:
            self._measure(step, 0, now - self._waiting_since.pop(step))

    def end(self, error: MilesError) -> None:
        """Note why no step comes after the newest."""
        self._end = error

    def fetch(self, step: int, rank: int) -> Any:
        """Give a rank the content of the chunk that holds a step; None: it has not come yet.

        Raises:
            MilesError: why the stream ended before the step.
            RunError: the chunk was released, or the stream began after the step.
        """
        for chunk in self._chunks:
            if chunk.first_step <= step <= chunk.last_step:
                chunk.fetched_by.add(rank)
                self._release()
                return chunk.content

        if step <= self._newest:
            raise RunError(
                f"step {step} of the data stream is gone: every rank has passed it, or the "
                "stream began after it"
            )
        if self._end is not None:
            raise self._end
        return None

    def begin(self, step: int, now: float) -> int | None:
        """Note that a rank needs a step now.

        Returns:
            The queue depth, when the step is first needed; None afterwards.
        """
        is_committed = step <= self._newest and step not in self._reports
        if is_committed or step in self._measured or step in self._waiting_since:
            return None

        depth = min(max(self._newest - step + 1, 0), self._max_ready_steps)
        if depth == 0:
            self._waiting_since[step] = now
        else:
            self._measure(step, depth, 0.0)
        self._needed = max(self._needed, step)
        self._release()
        return depth

    def is_measured(self, step: int) -> bool:
        """Return whether a step was needed, and came."""
        return step in self._measured

    def is_beyond_end(self, step: int) -> bool:
        """Return whether the stream ended before a step."""
        return self._end is not None and step > self._newest

    def commit(self, step: int) -> StepReport:
        """Return the report of a measured step, and forget those of older ones.

        Raises:
            MilesError: why the stream ended, or that no rank has needed the step.
        """
        if step not in self._measured:
            raise self._end or LostError(
                f"step {step} of the data stream was committed, but never begun"
            )
        for old in [old for old in self._reports if old < step]:
            del self._reports[old]
        self._measured &= self._reports.keys()
        return self._reports[step]

    def overdue_step(self, now: float, limit_seconds: float) -> int | None:
        """Return a step that a rank has waited for too long. Reading ahead is not waiting."""
        for step, since in self._waiting_since.items():
            if now - since >= limit_seconds:
                return step
        return None

    def _measure(self, step: int, depth: int, wait_seconds: float) -> None:
        """Write what was measured into a step's report."""
        report = self._reports[step]
        timing = replace(report.timing, queue_depth=depth, wait_seconds=wait_seconds)
        self._reports[step] = replace(report, timing=timing)
        self._measured.add(step)

    def _release(self) -> None:
        """Let go of the chunks that every rank has fetched and none needs any more."""
        self._chunks = [
            chunk
            for chunk in self._chunks
            if len(chunk.fetched_by) < self._num_ranks or chunk.last_step >= self._needed
        ]
