"""The actor between the stream and the ranks: a thread fills `ReadySteps`, the ranks empty it.

    loaders -> blocks -> [thread: put] -> ReadySteps -> fetch, begin   (the ranks)
                                                     -> commit         (the driver)

All state is in `ReadySteps`. This file adds the waiting: for room, for a step, for a measurement.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.util.metrics import Gauge

from miles.data.config import DataConfig
from miles.data.files.manifest import Manifest
from miles.data.packing import shards
from miles.data.stream import pipeline, stages
from miles.data.stream.carried_encoder import CarriedEncoder
from miles.data.stream.ready_steps import ReadySteps
from miles.data.types import Chunk, StepReport
from miles.errors import LostError, MilesError, RunError

WAIT_SECONDS = 1800.0
"""The time that a rank waits for a step before it fails."""
GATE_SECONDS = 1.0
"""The time that one request of a loader at the gate waits for a yes."""
REPORT_SECONDS = 60.0
"""The time that a commit waits for the measurement of its step, which was sent before the step."""


class FeedActor:
    """Iterates the stream in a thread and hands its steps to the ranks. Runs as a Ray actor."""

    def __init__(
        self,
        manifest: Manifest,
        config: DataConfig,
        start_row: int,
        num_ranks: int,
        loader: pipeline.LoaderStages = pipeline.LOADER,
        encoder: CarriedEncoder | None = None,
    ) -> None:
        self._config = config
        self._loader = loader
        self._encoder = encoder and encoder.copied()
        self._first_step = stages.make_plan(manifest, config).step_at(start_row)
        self._first_block: Any = None  # PACKED_STEP, of the first step, until it is inspected
        self._ready = ReadySteps(
            self._first_step,
            num_ranks,
            max_ready_steps=config.stream.prefetch_steps,
            max_ahead_steps=_ahead_steps(config),
        )

        lock = threading.Lock()
        self._has_come = threading.Condition(lock)  # a block, or the stream's end
        self._is_needed = threading.Condition(lock)  # a step, which leaves room for others
        self._is_measured = threading.Condition(lock)  # a step, or the stream ended

        self._gauge = Gauge(
            "miles_data_prefetch_queue_depth",
            description="Steps ready when the trainer asked for the next one",
        )
        threading.Thread(target=self.run_stream, args=(manifest, start_row), daemon=True).start()

    def fetch(self, step: int, rank: int, data_ranks: Sequence[int]) -> list[Any]:
        """Return [reference to the `Chunk` that holds a step]; wait until it is there.

        Reading ahead is not needing: nothing is measured here.

        Args:
            data_ranks: of the rank's node, ascending: the chunk has their shards.

        Raises:
            MilesError: the stream ended before the step, or a rank has waited too long.
        """
        with self._has_come:
            while (content := self._ready.fetch(step, rank)) is None:
                self._has_come.wait(WAIT_SECONDS)
                overdue = self._ready.overdue_step(time.perf_counter(), WAIT_SECONDS)
                if overdue is not None:
                    raise LostError(
                        f"waited {WAIT_SECONDS:g} seconds for step {overdue} of the data stream"
                    )
        return [content.reference(tuple(data_ranks))]

    @ray.method(concurrency_group="gate")
    def may_load(self, first_step: int) -> bool:
        """Return whether a window that begins with this step is near enough to be loaded.

        Waits up to `GATE_SECONDS` for it to come near.
        """
        with self._is_needed:
            return self._is_needed.wait_for(lambda: self._ready.may_load(first_step), GATE_SECONDS)

    # One call at a time, in the order in which a rank makes them.
    @ray.method(concurrency_group="clock", num_returns=0)
    def begin(self, *steps: int) -> None:
        """Note that a rank needs these steps now. The first time measures queue depth and wait."""
        with self._is_needed:
            for step in steps:
                depth = self._ready.begin(step, time.perf_counter())
                if depth is not None:
                    self._gauge.set(depth)
            self._is_needed.notify_all()
            self._is_measured.notify_all()

    def commit(self, step: int) -> StepReport:
        """Return the report of a step that was begun, with what was measured; forget older ones.

        Raises:
            MilesError: why the stream ended before the step, or that no rank has needed it.
        """
        with self._is_measured:
            # The steps before the stream's end were given: what measures them may be on its way.
            self._is_measured.wait_for(
                lambda: self._ready.is_measured(step) or self._ready.is_beyond_end(step),
                REPORT_SECONDS,
            )
            return self._ready.commit(step)

    def first_segments(self) -> list[list[dict[str, Any]]]:
        """Return [micro-batches of all ranks][segments] of the first step, and let go of it.

        Each segment has its ids, its token mask and its row.
        """
        with self._has_come:
            block = self._first_block
            self._first_block = None

        chunk = shards.whole(block, shards.reports(block))
        segments = shards.segments(chunk)
        batches = []
        for count in chunk.micro_batch_segments.tolist():
            batches.append(
                [
                    {
                        "row_id": segment.row_id,
                        "input_ids": segment.input_ids.tolist(),
                        "loss_mask": segment.loss_mask.tolist(),
                    }
                    for segment in itertools.islice(segments, count)
                ]
            )
        return batches

    def run_stream(self, manifest: Manifest, start_row: int) -> None:
        """Put every block of the stream, and note how it ended. The body of the actor's thread."""
        context = ray.get_runtime_context()
        gate = Gate(context.current_actor) if context.get_actor_id() else None

        try:
            dataset = pipeline.build(
                manifest, self._config, start_row, gate, self._loader, self._encoder
            )
            for block in pipeline.blocks(dataset):
                self.put(block)
            newest = self._ready.newest
            self.end(RunError(f"the data stream ended with step {newest}; none comes after it"))
        except Exception as error:  # ends the thread: every waiting rank gets it
            cause = pipeline.cause_of(error)
            if isinstance(cause, (LostError, RunError)):
                cause.args = (f"{cause}; {self._next_rows(manifest)}",)
            self.end(cause)

    def put(self, block: pa.Table) -> None:
        """Take a block of the stream, once there is room."""
        reports = shards.reports(block)
        content = _SharedChunk(shards.whole(block, reports))
        with self._is_needed:
            self._is_needed.wait_for(lambda: self._ready.has_room)
            if reports[0].position.index == self._first_step:
                self._first_block = block.slice(0, 1)
            self._ready.put(reports, content, time.perf_counter())
            self._has_come.notify_all()
            self._is_measured.notify_all()

    def end(self, error: MilesError) -> None:
        """Note why no further block comes. Every rank that waits for one gets the error."""
        with self._has_come:
            self._ready.end(error)
            self._has_come.notify_all()
            self._is_measured.notify_all()

    def _next_rows(self, manifest: Manifest) -> str:
        """Say where the rows are that were being loaded when the stream failed.

        A row that kills its loader each time can then be looked for.
        """
        step = self._ready.newest + 1
        plan = stages.make_plan(manifest, self._config)
        for ref in plan.windows(0):
            if ref.first_step <= step <= ref.last_step:
                rows = plan.window_steps(ref)[step - ref.first_step].row_ids
                name, first, low = manifest.locate(int(rows.min()))
                _, last, high = manifest.locate(int(rows.max()))
                return (
                    f"step {step} was to come next, of {len(rows)} rows between row {low} of "
                    f"{first} ({name}) and row {high} of {last}"
                )
        return "no step was to come next"


class _SharedChunk:
    """A block of the stream, and the chunks that were cut from it: one for each node that asked."""

    def __init__(self, chunk: Chunk) -> None:
        self._chunk = chunk
        self._references: dict[tuple[int, ...], Any] = {}
        self._lock = threading.Lock()

    def reference(self, data_ranks: tuple[int, ...]) -> Any:
        """Return a reference to the chunk of a node's data ranks."""
        with self._lock:
            if data_ranks not in self._references:
                self._references[data_ranks] = ray.put(shards.cut(self._chunk, data_ranks))
            return self._references[data_ranks]


class Gate:
    """Asks the actor, in a loader's process, whether a window may be loaded yet.

    It waits on a future, because Ray takes the CPU from a task that waits in `ray.get`, and starts
    one more process for it. It asks again and again, so that no request of a process that was
    killed keeps out its successor.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __call__(self, first_step: int) -> None:
        """Return when the window that begins with this step may be loaded."""
        while not self._handle.may_load.remote(first_step).future().result():
            pass


def _ahead_steps(config: DataConfig) -> int:
    """Return how far beyond the needed step windows are loaded.

    Each loader is at its window, and the trainers have one whole window meanwhile: not as much as
    memory would hold.
    """
    steps_per_window = config.order.rounded_window_rows // config.order.batch_size
    return max((config.stream.loader_cpus + 1) * steps_per_window, config.stream.prefetch_steps)
