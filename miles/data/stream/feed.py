"""The driver's end of the feed: opens the stream, and commits each step that was trained.

    Feed.open   config, cursor -> manifest, plan, certificate -> FeedActor, and the loaders
    commit      step k was trained -> its report, the ledger, the next cursor

The steps themselves go from the actor to the ranks: `feed_actor.FeedActor` holds them ready, each
trainer reads its own with a `step_iterator.StepIterator`.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import ray

from miles.common import own_files, run_folder, storage
from miles.common.patient_file import PatientFile, Report
from miles.data.config import DataConfig
from miles.data.stream import pipeline, stages
from miles.data.stream.carried_encoder import CarriedEncoder
from miles.data.stream.counted_stream import CountedStream
from miles.data.stream.feed_actor import FeedActor
from miles.data.stream.ledger import Ledger
from miles.data.stream.reject_limits import RejectLimits
from miles.data.types import Cursor, StepReport

BLOCK_RANKS = 32
"""Ranks that a block of `StreamConfig.target_block_bytes` is for. For more, blocks are larger."""


class Feed:
    """Starts the stream, and enters the steps that were trained into the ledger and the cursor."""

    def __init__(
        self,
        stream: CountedStream,
        config: DataConfig,
        cursor: Cursor,
        handle: Any,
        run_dir: str,
    ) -> None:
        self.info = stream.info
        self.handle = handle
        self.first_step = stream.plan.step_at(cursor.consumed_rows)
        self._manifest = stream.manifest
        self._config = config
        self._ends = stream.ends(config.order.max_steps)
        self._cursor = cursor
        self._run_dir = run_dir
        self.report: Report = print
        """is told what cannot be written"""

        self._ledger = Ledger(
            stream.manifest,
            storage.join(run_dir, run_folder.REJECTS),
            RejectLimits.of(config),
            totals=cursor.ledger_totals or None,
            next_step=self.first_step,
            report=self._tell,
            unused_keys=cursor.unused_keys,
        )
        path = storage.join(run_dir, run_folder.FIRST_BATCH)
        self._first_batch = PatientFile(path, report=self._tell)

    @classmethod
    def open(
        cls,
        config: DataConfig,
        *,
        cursor: Cursor | None,
        cursor_path: str,
        num_ranks: int,
        run_dir: str,
        loader: pipeline.LoaderStages = pipeline.LOADER,
        stream: CountedStream | None = None,
    ) -> Feed:
        """Check the cursor and start the actor.

        Args:
            config: of the training stream.
            cursor: of the checkpoint to resume from; None: the run begins.
            cursor_path: names the checkpoint in errors.
            num_ranks: trainers that will begin every step.
            run_dir: where the ledger and the first batch are kept (fsspec URL).
            loader: the stages of the loader; tests give some that are slow or fail.
            stream: of this configuration, where its rows are counted already.

        Raises:
            MilesError: a source, tokenizer or cursor that cannot be used.
        """
        assert config.held_out == "leave_out", "a feed is of the training stream"
        pipeline.require_loader_cpus(config)
        stream = stream or CountedStream.count(config)
        start = stream.cursor_from(cursor, cursor_path)
        # Nothing is written or started before here: a run that is refused leaves no trace.
        encoder = stages.encoder_of(stream.encode)
        certificate = json.dumps(encoder.certificate.to_json(), indent=1, ensure_ascii=False)
        own_files.write_if_new(storage.join(run_dir, run_folder.CERTIFICATE), certificate)

        config = dataclasses.replace(config, encode=stream.encode)
        carried = CarriedEncoder.put(config.encode, makes_engine=stream.has_many_rows)
        pipeline.warm_up(config, carried)
        # A rank has one request in flight, beside those that have a concurrency group.
        actor = ray.remote(
            num_cpus=0,
            max_concurrency=num_ranks + 4,
            concurrency_groups={"clock": 1, "gate": config.stream.loader_cpus + 1},
        )(FeedActor)
        sized = _with_blocks_for(config, num_ranks)
        handle = actor.remote(
            stream.manifest, sized, start.consumed_rows, num_ranks, loader, carried
        )
        return cls(stream, config, start, handle, run_dir)

    def commit(self, step: int) -> StepReport:
        """Enter a step that was trained into the ledger and the cursor, and return its report.

        Steps are committed in order. Where an epoch ends, or the run, all rows so far are judged:
        before a checkpoint is saved of them.

        Raises:
            DataError: too many rows were dropped, or one that ends the run by itself.
            LostError: the feed is gone.
        """
        try:
            report: StepReport = ray.get(self.handle.commit.remote(step))
            if step == self.first_step:
                self._keep_first_batch()
        except ray.exceptions.RayError as error:
            raise pipeline.cause_of(error) from error

        self._ledger.commit(step, report.rows)
        if step in self._ends:
            self.finish()
        self._cursor = dataclasses.replace(
            self._cursor,
            consumed_rows=report.position.next_row,
            tokens_seen=self._cursor.tokens_seen + report.content.num_trained_tokens,
            ledger_totals=self._ledger.totals(),
            unused_keys=self._ledger.unused_keys(),
        )
        return report

    def finish(self) -> None:
        """Judge the rows that were dropped, however few were read.

        Raises:
            DataError: too many rows were dropped, or all.
        """
        self._ledger.judge()
        self._ledger.require_trained()

    def ledger_summary(self) -> dict[str, dict[str, Any]]:
        """Return the ledger of each source after the last committed step (`Ledger.summary`)."""
        return self._ledger.summary()

    def source_epochs(self) -> tuple[float, ...]:
        """Return how many times each source was read, after the last committed step."""
        return self._ledger.epochs()

    def locate(self, row_id: int) -> tuple[str, str, int]:
        """Return a row's source, its file and its number in the file, from 0."""
        return self._manifest.locate(row_id)

    def cursor(self) -> Cursor:
        """Return where the run stands after the last committed step."""
        return self._cursor

    def flush(self) -> None:
        """Write the files that are remote, or could not be written before."""
        self._ledger.flush()
        self._first_batch.flush()

    def close(self) -> None:
        """End the actor and its stream, and close the files."""
        ray.kill(self.handle)
        self._ledger.close()
        self._first_batch.close()

    def _tell(self, text: str) -> None:
        self.report(text)

    def _keep_first_batch(self) -> None:
        """Write the first batch, for `miles inspect`. That of a resumed run stays as it is."""
        batches = ray.get(self.handle.first_segments.remote())
        path = storage.join(self._run_dir, run_folder.FIRST_BATCH)
        if self.first_step > 0 and storage.exists(path):
            return
        for segments in batches:
            for segment in segments:
                source, file, row = self._manifest.locate(segment["row_id"])
                segment.update(source=source, file=file, row=row)
        content = {"tokenizer": self._config.encode.tokenizer, "micro_batches": batches}
        self._first_batch.replace([json.dumps(content)])


def _with_blocks_for(config: DataConfig, num_ranks: int) -> DataConfig:
    """Return the configuration with larger blocks for many ranks, each of which asks for each."""
    num_bytes = config.stream.target_block_bytes * max(num_ranks // BLOCK_RANKS, 1)
    stream = dataclasses.replace(config.stream, target_block_bytes=num_bytes)
    return dataclasses.replace(config, stream=stream)
