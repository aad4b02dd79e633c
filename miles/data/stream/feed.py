"""One ordered stream -> every rank: an actor with a bounded window of ready steps, and iterators that read it.

    stream -> [steps 4 5 6 7] [steps 8 9 10 11] -> rank 0: next() -> its micro-batches of step 4
                                                -> rank 1: next() -> its micro-batches of step 4

Steps travel in chunks, one for each data rank: the steps of a block of the stream. The next block is taken as soon as
fewer than `prefetch_steps` steps are ready. A rank fetches its next chunk while it computes on the one that it has
(`fetch`), and a step that it needs is said to the actor (`begin`): by any rank that has to wait for it, at once, and by
rank 0 of every step, a few milliseconds' steps in one call. The queue depth of a step is the number of steps ready when
it is first said to be needed, itself included, and counted up to `prefetch_steps`: 0 exactly when a rank had to wait
for the stream. (A chunk that is ready but still on its way from another node is not counted as waiting.) The stream
runs ahead by as many windows as there are loaders, and one (by `prefetch_steps` at least), however slow the ranks are.
Requests are idempotent; a chunk is let go when every rank has fetched it and a later step is needed, and lives on where
a rank still holds it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.util.metrics import Gauge

from miles.common import run_folder, storage
from miles.data.config import DataConfig
from miles.data.files.group_sizes import require_small_groups
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.packing import shards
from miles.data.stream import pipeline, stages
from miles.data.stream.ledger import Ledger, fatal_reasons
from miles.data.types import Chunk, Cursor, MicroBatch, StepReport
from miles.errors import ClusterError, MilesError

WAIT_SECONDS = 1800.0
"""How long a rank waits for a step before it fails."""
BEGIN_SECONDS = 0.005
"""How long rank 0 gathers steps that it has in hand, before it says that it needs them."""
GATE_SECONDS = 1.0
"""How long one request of a loader, whether it may go on, is kept waiting for a yes."""
REPORT_SECONDS = 60.0
"""How long the report of a step that was trained waits for its measurement, which was sent before the step."""


@dataclass(frozen=True)
class StreamInfo:
    """What is known of a stream before it runs."""

    num_rows: int
    steps_per_epoch: int
    num_steps: int
    source_names: tuple[str, ...]
    manifest_fingerprint: str
    encoder_fingerprint: str


@dataclass
class _Held:
    """A chunk that some rank has not fetched yet."""

    first_step: int
    last_step: int
    references: list[Any]
    """one a data rank, to its `Chunk`"""
    fetched_by: set[int]


class FeedActor:
    """Iterates the stream in a thread and hands its steps to the ranks. Runs as a Ray actor."""

    def __init__(
        self, manifest: Manifest, config: DataConfig, start_row: int, num_ranks: int
    ) -> None:
        self._config, self._num_ranks = config, num_ranks
        lock = threading.Lock()
        self._came = threading.Condition(lock)  # a block, or the stream's end
        self._went = threading.Condition(lock)  # a step, which leaves room
        # Each loader at its window, and one whole window for the trainers meanwhile; not as much as memory would hold.
        steps_per_window = config.order.rounded_window_rows // config.order.batch_size
        self._ahead_steps = max(
            (config.stream.loader_cpus + 1) * steps_per_window, config.stream.prefetch_steps
        )
        self._was_measured = threading.Condition(lock)
        self._first_block: Any = (
            None  # PACKED_STEP, of the first step, until it is kept in the run's folder
        )
        self._held: list[_Held] = []
        self._reports: dict[int, StepReport] = {}  # until committed
        self._first_step = stages.make_plan(manifest, config).step_at(start_row)
        self._newest = self._first_step - 1  # the newest step that the stream gave
        self._needed = self._newest  # the newest step that is needed
        self._measured: set[int] = set()  # of the steps in `_reports`
        self._waited_since: dict[int, float] = {}  # step -> since when a rank waits for it
        self._error: MilesError | None = None  # why no step comes after the newest
        self._gauge = Gauge(
            "miles_data_prefetch_queue_depth",
            description="Steps ready when the trainer asked for the next one",
        )
        threading.Thread(target=self._produce, args=(manifest, start_row), daemon=True).start()

    def fetch(self, step: int, rank: int, dp_rank: int) -> list[Any]:
        """[reference to the `Chunk` of a data rank that holds a step]; waits until it is there. Measures nothing.

        Raises:
            MilesError: what ended the stream before the step, or that a rank has waited too long.
        """
        with self._came:
            while step > self._newest and self._error is None:
                self._came.wait(WAIT_SECONDS)
                self._check_waits()
            for held in self._held:
                if held.first_step <= step <= held.last_step:
                    held.fetched_by.add(rank)
                    self._let_go()
                    return [held.references[dp_rank]]
            if step > self._newest:
                assert self._error is not None
                raise self._error
            raise ClusterError(
                f"step {step} of the data stream is gone: every rank has gone beyond it, or it began later"
            )

    @ray.method(concurrency_group="gate")
    def may_load(self, first_step: int) -> bool:
        """Whether a window that begins with this step may be loaded by now, or soon: not before it can be of use."""
        with self._went:
            return self._went.wait_for(
                lambda: first_step <= self._needed + self._ahead_steps, GATE_SECONDS
            )

    @ray.method(
        concurrency_group="clock", num_returns=0
    )  # one at a time, in the order in which a rank says it
    def begin(self, *steps: int) -> None:
        """A rank needs these steps now; the first time measures the queue depth, and how long a step is waited for."""
        with self._went:
            for step in steps:
                is_over = step <= self._newest and step not in self._reports
                if is_over or step in self._measured or step in self._waited_since:
                    continue
                depth = min(max(self._newest - step + 1, 0), self._config.stream.prefetch_steps)
                self._gauge.set(depth)
                if not depth:
                    self._waited_since[step] = time.perf_counter()
                else:
                    self._measure(step, depth, 0.0)
                self._needed = max(self._needed, step)
            self._let_go()
            self._went.notify_all()

    def report(self, step: int) -> StepReport:
        """The report of a step that was begun, with what was measured; older ones are forgotten.

        Raises:
            MilesError: what ended the stream before the step, or that no rank said that it needs it.
        """
        with self._was_measured:
            # A stream that came to its end has given its steps all the same: what they measure may be on its way.
            self._was_measured.wait_for(
                lambda: step in self._measured or (self._error is not None and step > self._newest),
                REPORT_SECONDS,
            )
            if step not in self._measured:
                raise self._error or ClusterError(
                    f"step {step} of the data stream was committed, but never begun"
                )
            for old in [old for old in self._reports if old < step]:
                del self._reports[old]
            self._measured &= self._reports.keys()
            return self._reports[step]

    def first_segments(self) -> list[list[dict[str, Any]]]:
        """[micro-batches of all ranks][segments]: ids, token mask and row of the first step; it is let go then."""
        with self._came:
            block, self._first_block = self._first_block, None
        batches = []
        for chunk in shards.chunks(block, shards.reports(block)):
            lengths, start, first = chunk.segment_lengths.tolist(), 0, 0
            for count in chunk.micro_batch_segments.tolist():
                segments = []
                for number in range(first, first + count):
                    part = slice(start, start + lengths[number])
                    segments.append(
                        {
                            "row_id": int(chunk.segment_row_ids[number]),
                            "input_ids": chunk.input_ids[part].tolist(),
                            "loss_mask": chunk.loss_mask[part].tolist(),
                        }
                    )
                    start += lengths[number]
                batches.append(segments)
                first += count
        return batches

    def _produce(self, manifest: Manifest, start_row: int) -> None:
        context = ray.get_runtime_context()
        gate = _Gate(context.current_actor) if context.get_actor_id() else None
        try:
            for block in pipeline.blocks(pipeline.build(manifest, self._config, start_row, gate)):
                self._add(block)
            end: MilesError = ClusterError(
                f"the data stream ended with step {self._newest}; none comes after it"
            )
        except Exception as error:  # the thread's end: every waiting rank gets it
            end = pipeline.cause_of(error)
            if isinstance(end, ClusterError):
                end = ClusterError(f"{end}; {self._unmade(manifest)}")
        with self._came:
            self._error = end
            self._came.notify_all()
            self._was_measured.notify_all()

    def _unmade(self, manifest: Manifest) -> str:
        """Where the rows are that were being loaded when the stream failed, so that one that kills its loader each time
        can be looked for."""
        step = self._newest + 1
        plan = stages.make_plan(manifest, self._config)
        for ref in plan.windows(0):
            if ref.first_step <= step <= ref.last_step:
                rows = plan.window_steps(ref)[step - ref.first_step].row_ids
                (name, first, low), (_, last, high) = (
                    manifest.locate(int(row)) for row in (rows.min(), rows.max())
                )
                return (
                    f"step {step} was to come next, of {len(rows)} rows between row {low} of {first} ({name}) and row "
                    f"{high} of {last}"
                )
        return "no step was to come next"

    def _add(self, block: pa.Table) -> None:
        """Takes a block of the stream, once there is room."""
        reports = shards.reports(block)
        references = [ray.put(chunk) for chunk in shards.chunks(block, reports)]
        with self._went:
            self._went.wait_for(
                lambda: self._newest - self._needed < self._config.stream.prefetch_steps
            )
            assert reports[0].position.index == self._newest + 1, (
                f"step {reports[0].position.index} came after step {self._newest}"
            )
            if reports[0].position.index == self._first_step:
                self._first_block = block.slice(0, 1)
            self._held.append(
                _Held(reports[0].position.index, reports[-1].position.index, references, set())
            )
            self._newest = reports[-1].position.index
            self._reports.update((report.position.index, report) for report in reports)
            now = time.perf_counter()
            for step in [step for step in self._waited_since if step <= self._newest]:
                self._measure(step, 0, now - self._waited_since.pop(step))
            self._came.notify_all()

    def _measure(self, step: int, depth: int, wait_seconds: float) -> None:
        report = self._reports[step]
        timing = dataclasses.replace(report.timing, queue_depth=depth, wait_seconds=wait_seconds)
        self._reports[step] = dataclasses.replace(report, timing=timing)
        self._measured.add(step)
        self._was_measured.notify_all()

    def _let_go(self) -> None:
        """Chunks that every rank has fetched and none needs any more."""
        self._held = [
            held
            for held in self._held
            if len(held.fetched_by) < self._num_ranks or held.last_step >= self._needed
        ]

    def _check_waits(self) -> None:
        """To be called while waiting: whether a rank, not only its read-ahead, has waited too long."""
        for step, since in self._waited_since.items():
            if time.perf_counter() - since >= WAIT_SECONDS:
                raise ClusterError(
                    f"waited {WAIT_SECONDS:g} seconds for step {step} of the data stream"
                )


class _Gate:
    """Asks the actor, in a loader's process.

    By a future: of a task that waits in `ray.get` Ray takes the CPU, and starts one more process for it. Again and
    again, so that no request of a process that was killed is left to keep out its successor's.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __call__(self, first_step: int) -> None:
        while not self._handle.may_load.remote(first_step).future().result():
            pass


class StepIterator:
    """A trainer's iterator over its own micro-batches; a thread of its own reads ahead of the computation.

    The reports are as the stream made them: what is measured when a step is handed out, `Feed.commit` knows.

    Args:
        handle: `Feed.handle`.
        rank: of the trainer, among all.
        dp_rank: whose data it reads.
        first_step: where it begins.
        num_steps: of the whole run; it ends there.
    """

    def __init__(
        self, handle: Any, rank: int, dp_rank: int, first_step: int, num_steps: int
    ) -> None:
        self._handle, self._rank, self._dp_rank = handle, rank, dp_rank
        self._step, self._num_steps = first_step, num_steps
        self._steps: Iterator[tuple[StepReport, tuple[MicroBatch, ...]]] = iter(())
        self._ahead: queue.Queue[Chunk | MilesError] = queue.Queue(maxsize=1)
        self._failed: MilesError | None = None
        self._begun: queue.SimpleQueue[int] = queue.SimpleQueue()
        threading.Thread(target=self._read_ahead, args=(first_step,), daemon=True).start()
        if rank == 0 and first_step < num_steps:
            threading.Thread(target=self._tell_begun, daemon=True).start()

    def __iter__(self) -> StepIterator:
        return self

    def __next__(self) -> tuple[StepReport, tuple[MicroBatch, ...]]:
        """Raises:
        MilesError: what ended the stream.
        """
        if self._step >= self._num_steps:
            raise StopIteration
        following = next(self._steps, None)
        if following is None and self._ahead.empty():
            self._handle.begin.remote(self._step)
        if self._rank == 0:
            self._begun.put(self._step)
        if following is None:
            self._steps = self._take()
            following = next(self._steps)
        report, micro_batches = following
        index = report.position.index
        assert index == self._step, f"asked for step {self._step}, got {index}"
        self._step += 1
        return report, micro_batches

    def _take(self) -> Iterator[tuple[StepReport, tuple[MicroBatch, ...]]]:
        """The steps of the next chunk, from the one that is needed on."""
        taken = self._failed or self._ahead.get()
        if isinstance(taken, MilesError):
            self._failed = taken
            raise taken
        skipped = self._step - taken.reports[0].position.index
        return itertools.islice(
            zip(taken.reports, shards.micro_batches(taken), strict=True), skipped, None
        )

    def _tell_begun(self) -> None:
        """Says that steps are needed, without a call for each of them where they take no time."""
        step = -1
        while step < self._num_steps - 1:
            steps = [step := self._begun.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    steps.append(step := self._begun.get_nowait())
            self._handle.begin.remote(*steps)
            time.sleep(BEGIN_SECONDS)

    def _read_ahead(self, step: int) -> None:
        try:
            while step < self._num_steps:
                (reference,) = ray.get(self._handle.fetch.remote(step, self._rank, self._dp_rank))
                chunk: Chunk = ray.get(reference)
                del reference  # or it would outlive the chunk
                step = chunk.reports[-1].position.index + 1
                self._ahead.put(chunk)
                del chunk
        except Exception as error:  # of the stream, or of an actor that is gone
            self._ahead.put(pipeline.cause_of(error))


class Feed:
    """The driver's side: starts the stream, and enters consumed steps into the ledger and the cursor."""

    def __init__(
        self,
        info: StreamInfo,
        manifest: Manifest,
        config: DataConfig,
        cursor: Cursor,
        handle: Any,
        run_dir: str,
    ) -> None:
        plan = stages.make_plan(manifest, config)
        self.info, self.handle, self.first_step = info, handle, plan.step_at(cursor.consumed_rows)
        self._manifest, self._config, self._cursor, self._run_dir = (
            manifest,
            config,
            cursor,
            run_dir,
        )
        self._ledger = Ledger(
            manifest,
            storage.join(run_dir, run_folder.REJECTS),
            max_bad_fraction=config.max_bad_fraction,
            totals=cursor.ledger_totals or None,
            next_step=self.first_step,
            max_bad_rows_in_a_row=config.max_bad_rows_in_a_row,
            fatal_reasons=fatal_reasons(config.encode),
        )

    @classmethod
    def open(
        cls,
        config: DataConfig,
        *,
        cursor: Cursor | None,
        cursor_path: str,
        num_ranks: int,
        run_dir: str,
    ) -> Feed:
        """Counts the rows, certifies the tokenizer, checks the cursor and starts the actor.

        Args:
            cursor: of the checkpoint to go on from; None: from the beginning.
            cursor_path: names the checkpoint in errors.
            num_ranks: trainers that will begin every step.
            run_dir: where the ledger and the first batch are kept (fsspec URL).

        Raises:
            MilesError: a source, tokenizer or cursor that cannot be used.
        """
        assert config.held_out == "leave_out", "a feed is of the training stream"
        pipeline.require_loader_cpus(config)
        encoder = stages.encoder_of(config.encode)
        manifest = build_manifest(config.sources)
        plan = stages.make_plan(manifest, config)
        source_window_rows = [plan.source_window_rows(source) for source in range(plan.num_sources)]
        require_small_groups(manifest, config.order.rounded_window_rows, source_window_rows)
        info = StreamInfo(
            manifest.num_rows,
            plan.steps_per_epoch,
            plan.num_steps,
            manifest.source_names,
            manifest.fingerprint,
            encoder.fingerprint,
        )
        today = Cursor(
            consumed_rows=0,
            seed=config.order.seed,
            shuffle=config.order.shuffle,
            window_rows=config.order.rounded_window_rows,
            batch_size=config.order.batch_size,
            drop_last=config.order.drop_last,
            mixture=config.order.integer_weights,
            manifest_fingerprint=info.manifest_fingerprint,
            encoder_fingerprint=info.encoder_fingerprint,
            held_out_fraction=config.held_out_fraction,
        )
        if cursor is not None:
            cursor.require_same_data(today, cursor_path)
        certificate = json.dumps(encoder.certificate.to_json(), indent=1, ensure_ascii=False)
        storage.write_text(
            storage.join(run_dir, run_folder.CERTIFICATE), certificate
        )  # not of a run that is refused
        pipeline.warm_up(config)
        # A rank has one request in flight, beside those that the clock serves.
        groups = {"clock": 1, "gate": config.stream.loader_cpus + 1}
        actor = ray.remote(num_cpus=0, max_concurrency=num_ranks + 4, concurrency_groups=groups)(
            FeedActor
        )
        start = cursor or today
        handle = actor.remote(manifest, config, start.consumed_rows, num_ranks)
        return cls(info, manifest, config, start, handle, run_dir)

    def commit(self, step: int) -> StepReport:
        """Enters a step that was trained. Steps are committed in order.

        Raises:
            DataError: too many rows were dropped, or one that ends the run by itself.
            ClusterError: the feed is gone.
        """
        try:
            report: StepReport = ray.get(self.handle.report.remote(step))
            if step == self.first_step:
                self._keep_first_batch()
        except ray.exceptions.RayError as error:
            raise pipeline.cause_of(error) from error
        self._ledger.commit(step, report.rows)
        self._cursor = dataclasses.replace(
            self._cursor,
            consumed_rows=report.position.next_row,
            tokens_seen=self._cursor.tokens_seen + report.content.num_trained_tokens,
            ledger_totals=self._ledger.totals(),
        )
        return report

    def finish(self) -> None:
        """To be called when the last step was committed.

        Raises:
            DataError: too many rows were dropped, of however few.
        """
        self._ledger.judge()

    def ledger_summary(self) -> dict[str, dict[str, Any]]:
        """What the ledger says of each source after the last committed step (see `Ledger.summary`)."""
        return self._ledger.summary()

    def source_epochs(self) -> tuple[float, ...]:
        """How many times each source was gone through, after the last committed step."""
        return self._ledger.epochs()

    def locate(self, row_id: int) -> tuple[str, str, int]:
        """The source, the file and the row's number in it (from 0) of a `MicroBatch.row_ids`' row."""
        return self._manifest.locate(row_id)

    def cursor(self) -> Cursor:
        """Where the run stands after the last committed step."""
        return self._cursor

    def close(self) -> None:
        """Ends the actor and its stream."""
        ray.kill(self.handle)

    def _keep_first_batch(self) -> None:
        """What the model was fed first, so that it can be looked at (`miles inspect`); a resumed run's stays."""
        batches = ray.get(self.handle.first_segments.remote())
        if self.first_step > 0 and storage.exists(
            storage.join(self._run_dir, run_folder.FIRST_BATCH)
        ):
            return
        for segments in batches:
            for segment in segments:
                segment["source"], segment["file"], segment["row"] = self._manifest.locate(
                    segment["row_id"]
                )
        content = {"tokenizer": self._config.encode.tokenizer, "micro_batches": batches}
        storage.write_text(storage.join(self._run_dir, run_folder.FIRST_BATCH), json.dumps(content))
