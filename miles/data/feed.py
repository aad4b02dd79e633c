"""One ordered stream -> every rank: an actor with a bounded window of ready steps, and iterators that read it.

    stream -> [step 7] [step 8] [step 9] -> rank 0: next() -> its micro-batches of step 7
              at most `prefetch_steps`   -> rank 1: next() -> its micro-batches of step 7

A trainer asks for step k + 1 (`fetch`) before it computes step k, and says when it really needs it (`begin`).
The queue depth of a step is the number of steps ready when the first rank begins it, itself included: 0 exactly
when that rank had to wait. Requests are idempotent; a step is freed when every rank has begun a later one.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.metrics import Gauge

from miles import storage
from miles.data import pipeline, stages
from miles.data.config import DataConfig
from miles.data.ledger import Ledger, fatal_reasons
from miles.data.manifest import Manifest, build_manifest
from miles.data.types import Cursor, MicroBatch, StepReport
from miles.errors import ClusterError, MilesError

FIRST_BATCH = "first_batch.json"
REJECTS = "rejects.jsonl"
CERTIFICATE = "certificate.json"
WAIT_SECONDS = 1800.0
"""How long a rank waits for a step before it fails."""


@dataclass(frozen=True)
class StreamInfo:
    """What is known of a stream before it runs."""

    num_rows: int
    steps_per_epoch: int
    num_steps: int
    source_names: tuple[str, ...]
    manifest_fingerprint: str
    encoder_fingerprint: str


class FeedActor:
    """Iterates the stream in a thread and hands its steps to the ranks. Runs as a Ray actor."""

    def __init__(self, manifest: Manifest, config: DataConfig, start_row: int, num_ranks: int) -> None:
        self._config = config
        self._changed = threading.Condition()
        self._first_row: Any = None  # the PACKED_STEP row of the first step, until it is kept in the run's folder
        self._data: dict[int, list[Any]] = {}  # step -> a reference for each data rank
        self._reports: dict[int, StepReport] = {}  # until committed
        self._begun = [-1] * num_ranks
        self._asked = -1  # the newest step that any rank wanted
        self._waited_since: float | None = None  # since when that step is waited for; None: it was ready
        self._newest = -1  # the newest step that the stream gave
        self._error: MilesError | None = None  # why none comes after it
        self._gauge = Gauge(
            "miles_data_prefetch_queue_depth", description="Steps ready when the trainer asked for the next one"
        )
        threading.Thread(target=self._produce, args=(manifest, start_row), daemon=True).start()

    def fetch(self, step: int, dp_rank: int) -> list[Any]:
        """[reference to one rank's `Segments`]; waits until the step is ready. Measures nothing."""
        with self._changed:
            self._wait_for(step)
            return [self._data[step][dp_rank]]

    def begin(self, step: int, rank: int) -> StepReport:
        """To be called when `rank` needs the step now; the first call measures the queue depth and the wait."""
        with self._changed:
            if step > self._asked:  # measured here, under the lock, and not after the wait: another rank may wake first
                depth = sum(ready >= step for ready in self._data) if step in self._data else 0
                self._asked, self._waited_since = step, None if depth else time.perf_counter()
                self._gauge.set(depth)
                if depth:
                    self._reports[step] = dataclasses.replace(self._reports[step], queue_depth=depth)
            self._wait_for(step)
            self._begun[rank] = max(self._begun[rank], step)
            for old in [old for old in self._data if old < min(self._begun)]:
                del self._data[old]
            self._changed.notify_all()
            return self._reports[step]

    def report(self, step: int) -> StepReport:
        """The report of a step that was begun; older ones are forgotten."""
        with self._changed:
            for old in [old for old in self._reports if old < step]:
                del self._reports[old]
            return self._reports[step]

    def first_segments(self) -> list[list[dict[str, Any]]]:
        """[micro-batches of all ranks][segments]: ids, token mask and row of the first step; it is let go then."""
        with self._changed:
            row, self._first_row = self._first_row, None
        batches = []
        for ids, mask, lengths, row_ids, _ in (batch for rank in stages.segments_by_rank(row) for batch in rank):
            start, segments = 0, []
            for length, row_id in zip(lengths.tolist(), row_ids.tolist(), strict=True):
                part = slice(start, start + length)
                segments.append({"row_id": row_id, "input_ids": ids[part].tolist(), "loss_mask": mask[part].tolist()})
                start += length
            batches.append(segments)
        return batches

    def _produce(self, manifest: Manifest, start_row: int) -> None:
        try:
            for row in pipeline.iterate(pipeline.build(manifest, self._config, start_row)):
                self._add(stages.report_of(row), row, [ray.put(rank) for rank in stages.segments_by_rank(row)])
            end: MilesError = ClusterError(f"the data stream ended with step {self._newest}; none comes after it")
        except Exception as error:  # the thread's end: every waiting rank gets it
            end = pipeline.cause_of(error)
        with self._changed:
            self._error = end
            self._changed.notify_all()

    def _add(self, report: StepReport, row: Any, references: list[Any]) -> None:
        """Makes a step ready, once there is room for it."""
        with self._changed:
            self._changed.wait_for(self._has_room)
            if self._newest < 0:
                self._first_row = row
            if report.index == self._asked and self._waited_since is not None:
                report = dataclasses.replace(report, wait_seconds=time.perf_counter() - self._waited_since)
            self._newest, self._data[report.index], self._reports[report.index] = report.index, references, report
            self._changed.notify_all()

    def _has_room(self) -> bool:
        newest = max(self._begun)
        return sum(step > newest for step in self._data) < self._config.stream.prefetch_steps

    def _wait_for(self, step: int) -> None:
        """Until the step is there; the lock is held by the caller."""
        if not self._changed.wait_for(lambda: step <= self._newest or self._error is not None, WAIT_SECONDS):
            raise ClusterError(f"waited {WAIT_SECONDS:g} seconds for step {step} of the data stream")
        if step not in self._data:
            if step > self._newest:
                assert self._error is not None
                raise self._error
            raise ClusterError(
                f"step {step} of the data stream is gone: every rank has gone beyond it, or it began later"
            )


class StepIterator:
    """A trainer's iterator over its own micro-batches, one step ahead of the computation.

    Args:
        handle: `Feed.handle`.
        rank: of the trainer, among all.
        dp_rank: whose data it reads.
        first_step: where it begins.
        num_steps: of the whole run; it ends there.
    """

    def __init__(self, handle: Any, rank: int, dp_rank: int, first_step: int, num_steps: int) -> None:
        self._handle, self._rank, self._dp_rank = handle, rank, dp_rank
        self._step, self._num_steps = first_step, num_steps
        self._ahead = handle.fetch.remote(first_step, dp_rank) if first_step < num_steps else None

    def __iter__(self) -> StepIterator:
        return self

    def __next__(self) -> tuple[StepReport, tuple[MicroBatch, ...]]:
        """Raises:
        MilesError: what ended the stream.
        """
        if self._step >= self._num_steps:
            raise StopIteration
        try:
            report = ray.get(self._handle.begin.remote(self._step, self._rank))
            segments = ray.get(ray.get(self._ahead)[0])
        except Exception as error:  # of the stream, or of an actor that is gone
            raise pipeline.cause_of(error) from error
        assert report.index == self._step, f"asked for step {self._step}, got {report.index}"
        self._step += 1
        if self._step < self._num_steps:
            self._ahead = self._handle.fetch.remote(self._step, self._dp_rank)
        return report, stages.micro_batches(segments)


class Feed:
    """The driver's side: starts the stream, and enters consumed steps into the ledger and the cursor."""

    def __init__(
        self, info: StreamInfo, manifest: Manifest, config: DataConfig, cursor: Cursor, handle: Any, run_dir: str
    ) -> None:
        plan = stages.make_plan(manifest, config)
        self.info, self.handle, self.first_step = info, handle, plan.step_at(cursor.consumed_rows)
        self._manifest, self._config, self._cursor, self._run_dir = manifest, config, cursor, run_dir
        self._ledger = Ledger(
            manifest,
            storage.join(run_dir, REJECTS),
            max_bad_fraction=config.max_bad_fraction,
            totals=cursor.ledger_totals or None,
            next_step=self.first_step,
            max_bad_rows_in_a_row=config.max_bad_rows_in_a_row,
            fatal_reasons=fatal_reasons(config.encode),
        )

    @classmethod
    def open(cls, config: DataConfig, *, cursor: Cursor | None, cursor_path: str, num_ranks: int, run_dir: str) -> Feed:
        """Counts the rows, certifies the tokenizer, checks the cursor and starts the actor.

        Args:
            cursor: of the checkpoint to go on from; None: from the beginning.
            cursor_path: names the checkpoint in errors.
            num_ranks: trainers that will begin every step.
            run_dir: where the ledger and the first batch are kept (fsspec URL).

        Raises:
            MilesError: a source, tokenizer or cursor that cannot be used.
        """
        cpus = ray.cluster_resources().get("CPU", 0)
        if cpus < config.stream.loader_cpus:  # Ray Data would wait for them for ever, and say nothing
            raise ClusterError(
                f"Ray has {cpus:g} CPUs; --loader-cpus {config.stream.loader_cpus} needs as many or more"
            )
        encoder = stages.encoder_of(config.encode)
        manifest = build_manifest(config.sources)
        plan = stages.make_plan(manifest, config)
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
        )
        if cursor is not None:
            cursor.require_same_data(today, cursor_path)
        certificate = json.dumps(encoder.certificate.to_json(), indent=1, ensure_ascii=False)
        storage.write_text(storage.join(run_dir, CERTIFICATE), certificate)  # not of a run that is refused
        actor = ray.remote(num_cpus=0, max_concurrency=2 * num_ranks + 4)(FeedActor)
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
        self._ledger.commit(report)
        self._cursor = dataclasses.replace(
            self._cursor,
            consumed_rows=report.next_row,
            tokens_seen=self._cursor.tokens_seen + report.num_trained_tokens,
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

    def cursor(self) -> Cursor:
        """Where the run stands after the last committed step."""
        return self._cursor

    def close(self) -> None:
        """Ends the actor and its stream."""
        ray.kill(self.handle)

    def _keep_first_batch(self) -> None:
        """What the model was fed first, so that it can be looked at (`miles inspect`); a resumed run's stays."""
        batches = ray.get(self.handle.first_segments.remote())
        if self.first_step > 0 and storage.exists(storage.join(self._run_dir, FIRST_BATCH)):
            return
        for segments in batches:
            for segment in segments:
                segment["source"], segment["file"], segment["row"] = self._manifest.locate(segment["row_id"])
        content = {"tokenizer": self._config.encode.tokenizer, "micro_batches": batches}
        storage.write_text(storage.join(self._run_dir, FIRST_BATCH), json.dumps(content))
