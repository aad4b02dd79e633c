"""The measurements of `stream.py`, one function each, which runs in a process of its own.

    write_files      sample -> Parquet files
    stream_pass      files -> steps in the hands of consumers: their times, and the peak of memory
    first_steps      several streams in turn, each only as far as its first step
    handing_out      the cost of a block of the stream in the feed

Moments are `time.monotonic()`, which on Linux and macOS all processes of a machine share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import _feed_costs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from _loader_costs import loader_costs, metered_loader
from _watch import LOOK_SECONDS, RESTING_LOOK_SECONDS, Watch

import miles
from miles.common import local_ray
from miles.data.config import (
    DataConfig,
    EncodeConfig,
    OrderConfig,
    PackConfig,
    SourceConfig,
    StreamConfig,
)
from miles.data.stream import pipeline, stages
from miles.data.stream.feed import Feed
from miles.data.stream.step_iterator import StepIterator
from miles.data.types import Cursor

GROUP_ROWS = 1_000

_T = TypeVar("_T")


@dataclass(frozen=True)
class Setup:
    """A stream: its files and its settings."""

    paths: tuple[str, ...]
    tokenizer: str
    batch_size: int
    window_rows: int
    dp_size: int
    """consumers, each of which takes one data rank's share of a step"""
    loader_cpus: int
    object_store_bytes: int
    block_bytes: int

    @property
    def config(self) -> DataConfig:
        return DataConfig(
            sources=(SourceConfig("rows", self.paths),),
            order=OrderConfig(
                batch_size=self.batch_size, shuffle=True, window_rows=self.window_rows
            ),
            encode=EncodeConfig(self.tokenizer),
            pack=PackConfig(dp_size=self.dp_size),
            stream=StreamConfig(loader_cpus=self.loader_cpus, target_block_bytes=self.block_bytes),
        )


def in_own_process(work: Callable[..., _T], *arguments: Any) -> _T:
    """Call a function in a new process, and return its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def stream_pass_of(checkout: Path, setup: Setup) -> dict[str, Any]:
    """Call `stream_pass` in a new process with the `miles` of another checkout."""
    line = "import _stream_runs as runs; runs.answer()"
    done = subprocess.run(
        [sys.executable, "-c", line],
        input=json.dumps(dataclasses.asdict(setup)),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert Path(answer["miles"]).is_relative_to(checkout.resolve()), answer["miles"]
    return answer


def answer() -> None:
    """Print the result of a pass as JSON; its setup comes on the standard input."""
    fields = json.load(sys.stdin)
    setup = Setup(**{**fields, "paths": tuple(fields["paths"])})
    answer = {**stream_pass(setup), "miles": miles.__file__}
    print(json.dumps(answer))


def write_files(folder: Path, source: str, num_files: int, rows_per_file: int) -> tuple[str, ...]:
    """Write the rows of `source` again and again, into files of equal size."""
    sample = pq.read_table(source)
    rows = np.arange(num_files * rows_per_file) % sample.num_rows
    paths = []
    for number in range(num_files):
        part = sample.take(pa.array(rows[number * rows_per_file : (number + 1) * rows_per_file]))
        paths.append(str(folder / f"part-{number:05}.parquet"))
        pq.write_table(part, paths[-1], row_group_size=GROUP_ROWS)
    return tuple(paths)


# --- the stream


@ray.remote(num_cpus=0)
class Consumer:
    """A trainer that only looks at its micro-batches, and notes when they came."""

    def ready(self) -> None:
        pass

    def read(
        self, handle: Any, rank: int, first: int, last: int, seconds: float
    ) -> list[dict[str, Any]]:
        """Read the steps from `first` to `last` (exclusive); hold each for some seconds."""
        trail = []
        iterator = StepIterator(handle, rank, rank, first, last)

        for _ in range(first, last):
            asked = time.monotonic()
            report, micro_batches = next(iterator)
            came = time.monotonic()
            for batch in micro_batches:
                assert batch.input_ids.any()
                assert batch.loss_mask.max() >= 0
            trail.append(
                {
                    "at": came,
                    "wait_seconds": came - asked,
                    "rows": report.rows.num_read,
                    "tokens": report.content.num_tokens,
                }
            )
            if seconds:
                time.sleep(seconds)

        return trail


def _own_ray(setup: Setup) -> contextlib.AbstractContextManager[None]:
    """Run a Ray of this process's own, of as many CPUs as the loader has."""
    return local_ray.running(setup.loader_cpus, setup.object_store_bytes)


def start_consumers(setup: Setup) -> list[Any]:
    """Start a consumer for each data rank, and wait until all are there."""
    consumers = [Consumer.remote() for _ in range(setup.dp_size)]
    ray.get([consumer.ready.remote() for consumer in consumers])
    return consumers


def open_feed(
    setup: Setup,
    run_dir: str,
    cursor: Cursor | None = None,
    loader: pipeline.LoaderStages = pipeline.LOADER,
) -> Feed:
    """Open the stream of a setup, at its beginning or at a cursor."""
    return Feed.open(
        setup.config,
        cursor=cursor,
        cursor_path="the cursor",
        num_ranks=setup.dp_size,
        run_dir=run_dir,
        loader=loader,
    )


def stream_pass(
    setup: Setup, hold_seconds: float = 0.0, max_steps: int | None = None
) -> dict[str, Any]:
    """Stream all rows once, or the first steps.

    Args:
        hold_seconds: how long a consumer keeps a step.

    Returns:
        Seconds of each phase, the trail of the steps, and the peaks of memory in bytes.
    """
    started = time.monotonic()
    with (
        _own_ray(setup),
        tempfile.TemporaryDirectory() as run_dir,
        tempfile.TemporaryDirectory() as cost_dir,
    ):
        with Watch(RESTING_LOOK_SECONDS if hold_seconds else LOOK_SECONDS) as watch:
            consumers = start_consumers(setup)
            ray_up = time.monotonic()
            feed = open_feed(setup, run_dir, loader=metered_loader(cost_dir))
            num_steps = min(feed.info.num_steps, max_steps or feed.info.num_steps)
            reads = [
                consumer.read.remote(feed.handle, rank, 0, num_steps, hold_seconds)
                for rank, consumer in enumerate(consumers)
            ]

            depths: list[int] = []
            if hold_seconds:  # a run commits its steps; without a hold only handing out counts
                depths = [feed.commit(step).timing.queue_depth for step in range(num_steps)]
            trails = ray.get(reads)
        feed.close()
        loader_us = loader_costs(cost_dir)
    assert all(len(trail) == num_steps for trail in trails), "steps are missing"
    return {
        "num_steps": num_steps,
        "queue_depths": depths,
        "peak_bytes": watch.peak_bytes,
        "loader_us": loader_us,
        **_phases(trails, watch, started, ray_up),
    }


def _phases(
    trails: Sequence[Sequence[dict[str, Any]]], watch: Watch, started: float, ray_up: float
) -> dict[str, Any]:
    """Return rows, tokens and seconds of a pass: as a whole, up to the first step, after it.

    Args:
        trails: [consumers][steps], as `Consumer.read` returns them.
        started: when the pass began; `ray_up`: when Ray and the consumers were there.
    """
    # A step has come when the last rank has its share.
    arrived: list[float] = []
    waited: list[float] = []
    for shares in zip(*trails, strict=True):
        arrived.append(max(share["at"] for share in shares))
        waited.append(max(share["wait_seconds"] for share in shares))

    steps = trails[0]
    after_first = steps[1:]
    seconds = arrived[-1] - arrived[0]
    rows = sum(step["rows"] for step in after_first)
    tokens = sum(step["tokens"] for step in after_first)
    cpu_seconds = watch.cpu_seconds(arrived[0], arrived[-1])

    return {
        "num_rows": sum(step["rows"] for step in steps),
        "num_tokens": sum(step["tokens"] for step in steps),
        "whole_seconds": arrived[-1] - started,
        "first_step_seconds": arrived[0] - ray_up,
        "first_step_with_ray_seconds": arrived[0] - started,
        "steady_seconds": seconds,
        "steady_rows_per_second": rows / seconds,
        "steady_tokens_per_second": tokens / seconds,
        "steady_wait_seconds": sum(waited[1:]),
        "longest_wait_seconds": max(waited[1:]),
        "others_us": {
            role: cpu / rows * 1e6 for role, cpu in cpu_seconds.items() if role != "loader"
        },
    }


def first_steps(cases: Sequence[tuple[Setup, int]], rounds: int) -> list[list[float]]:
    """Measure the seconds from opening a stream to the first step in every consumer's hand.

    The cases take turns; a first round is not counted. Before each, Ray is idle and has processes
    that have the tokenizer certified, so that the start of processes does not hide the difference.

    Args:
        cases: streams, and how many rows of each were consumed before.
    """
    seconds: list[list[float]] = [[] for _ in cases]
    first = cases[0][0]
    with _own_ray(first):
        consumers = start_consumers(first)
        stages.encoder_of(first.config.encode)
        for number in range(rounds + 1):
            for case, (setup, consumed_rows) in enumerate(cases):
                took = _first_step(setup, consumed_rows, consumers)
                if number:
                    seconds[case].append(took)
    return seconds


def _first_step(setup: Setup, consumed_rows: int, consumers: Sequence[Any]) -> float:
    with tempfile.TemporaryDirectory() as run_dir:
        cursor = None
        if consumed_rows:  # as a checkpoint would bring it
            before = open_feed(setup, run_dir)
            cursor = dataclasses.replace(before.cursor(), consumed_rows=consumed_rows)
            before.close()
        _warm_processes(setup)

        started = time.monotonic()
        feed = open_feed(setup, run_dir, cursor)
        step = feed.first_step
        reads = [
            consumer.read.remote(feed.handle, rank, step, step + 1, 0.0)
            for rank, consumer in enumerate(consumers)
        ]
        took = max(trail[0]["at"] for trail in ray.get(reads)) - started
        feed.close()

    return took


def _warm_processes(setup: Setup) -> None:
    """Wait until an ended stream is gone; give each CPU and the feed a process with a tokenizer."""
    while ray.available_resources().get("CPU", 0) < setup.loader_cpus:
        time.sleep(0.1)
    num_processes = setup.loader_cpus + 1
    warm = ray.remote(num_cpus=setup.loader_cpus / (num_processes + 1))(_certify)
    ray.get([warm.remote(setup.config.encode) for _ in range(num_processes)])


def _certify(config: EncodeConfig) -> None:
    stages.encoder_of(config)
    time.sleep(0.5)  # so that the next task gets another process


# --- the feed


def handing_out(
    setup: Setup, dp_sizes: Sequence[int], num_rounds: int
) -> dict[int, dict[str, dict[str, float]]]:
    """Measure the cost of one block of the stream in the feed's actor, by number of data ranks.

    Returns:
        For each, what `_feed_costs.costs` returns: with a chunk for each "rank", as it was before,
        and for each "node".
    """
    encoded = _feed_costs.block_of(setup.config, setup.block_bytes)
    found: dict[int, dict[str, dict[str, float]]] = {}
    with _own_ray(setup):
        processes = _feed_costs.start_ranks()
        for dp_size in dp_sizes:
            found[dp_size] = {}
            for name, node_ranks in (("rank", 1), ("node", _feed_costs.NODE_RANKS)):
                found[dp_size][name] = _feed_costs.costs(
                    setup.config, encoded, processes, dp_size, node_ranks, num_rounds
                )
    return found
