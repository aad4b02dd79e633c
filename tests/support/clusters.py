"""Scenarios in processes of their own, each with a Ray of its own; and what all tests of the stream compare.

    run("stream", {"config": …, "num_cpus": 4})  ->  a process, `ray.init(num_cpus=4)`, `stream(…)`  ->  JSON

A scenario takes and returns plain JSON. Its Ray ends with its process, and only that process's descendants are killed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import ray
import xxhash
from rich.console import Console

from miles.common import local_ray
from miles.data.config import (
    DataConfig,
    EncodeConfig,
    OrderConfig,
    PackConfig,
    SourceConfig,
    StreamConfig,
)
from miles.data.files.manifest import build_manifest
from miles.data.packing.shards import unpack
from miles.data.stream import feed as feed_module
from miles.data.stream import pipeline, stages
from miles.data.stream.feed import Feed, StepIterator
from miles.data.types import Cursor, MicroBatch, Step, StepReport
from miles.demo import rows
from miles.demo.tokenizer import build_tokenizer
from miles.train.driver.loop import train

PROJECT = Path(__file__).parents[2]
OBJECT_STORE_BYTES = 200 << 20

Seen = list[Any]
"""[step, fingerprint, what the ranks were given]: of each step what must be the same everywhere."""


def demo_settings(folder: Path, **order: Any) -> dict[str, Any]:
    """The demo's two files and tokenizer, in a folder: 652 rows, 4 of them broken; two windows an epoch, two epochs.

    Returns:
        What `config_of` takes; plain JSON.
    """
    files = rows.copy_rows(folder / "rows")
    build_tokenizer(rows.texts(), folder / "tokenizer")
    return {
        "sources": {name: str(file) for name, file in files.items()},
        "order": {
            "batch_size": 64,
            "shuffle": True,
            "seed": 3,
            "window_rows": 384,
            "num_epoch": 2,
            **order,
        },
        "encode": {"tokenizer": str(folder / "tokenizer"), "max_sample_tokens": 256},
        "pack": {"dp_size": 2, "max_tokens_per_gpu": 512},
        "stream": {},
    }


def config_of(settings: Mapping[str, Any]) -> DataConfig:
    return DataConfig(
        sources=tuple(SourceConfig(name, (path,)) for name, path in settings["sources"].items()),
        order=OrderConfig(**settings["order"]),
        encode=EncodeConfig(**settings["encode"]),
        pack=PackConfig(**settings["pack"]),
        stream=StreamConfig(**settings["stream"]),
    )


def delivered(ranks: Iterable[Iterable[MicroBatch]]) -> str:
    """Digest of all that the ranks are given of a step, whatever the layout: each sample by itself, sorted by row."""
    samples = []
    for batch in (batch for rank in ranks for batch in rank):
        for number, row_id in enumerate(batch.row_ids.tolist()):
            part = slice(batch.cu_seqlens[number], batch.cu_seqlens[number + 1])
            arrays = (
                batch.input_ids[part],
                batch.labels[part],
                batch.position_ids[part],
                batch.loss_mask[part],
            )
            if row_id >= 0:
                samples.append((row_id, *(array.tobytes() for array in arrays)))
    digest = xxhash.xxh64()
    for row_id, *parts in sorted(samples):
        for part in (str(row_id).encode(), *parts):
            digest.update(part)
    return digest.hexdigest()


def seen(step: Step) -> Seen:
    return [step.index, step.fingerprint, delivered(step.micro_batches)]


def local(config: DataConfig, start_row: int = 0) -> list[Step]:
    """The definition that everything is compared with: the pure stages in this process."""
    return list(stages.local_steps(build_manifest(config.sources), config, start_row))


def follow(
    feed: Feed, config: DataConfig, num_steps: int | None = None
) -> Iterator[tuple[StepReport, str]]:
    """Reads a feed as its trainers do, all ranks in this process, and commits each step: report, and digest.

    Args:
        num_steps: read so many, not to the end.
    """
    last = feed.info.num_steps if num_steps is None else feed.first_step + num_steps
    ranks = range(config.pack.dp_size)
    iterators = [StepIterator(feed.handle, rank, rank, feed.first_step, last) for rank in ranks]
    for step in range(feed.first_step, last):
        given = [next(iterator) for iterator in iterators]
        assert {report.position.index for report, _ in given} == {step}
        assert len({report.content.fingerprint for report, _ in given}) == 1
        yield feed.commit(step), delivered(batches for _, batches in given)


@contextlib.contextmanager
def opened(config: DataConfig, run_dir: str, cursor: Cursor | None = None) -> Iterator[Feed]:
    feed = Feed.open(
        config, cursor=cursor, cursor_path="there", num_ranks=config.pack.dp_size, run_dir=run_dir
    )
    try:
        yield feed
    finally:
        feed.close()


def processes(name: str, pid: int | None = None) -> list[psutil.Process]:
    """A process's descendants whose command line begins so, such as "ray::MapBatches"; None: of this one."""
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(name):
                    found.append(process)
    return found


def feed_actor_with(**stand_ins: Callable[..., Any]) -> type:
    """The feed's actor, in whose process these stand in place of the classes of `pipeline`, such as `_Pack`."""

    class FeedActor(feed_module.FeedActor):
        def __init__(self, *arguments: Any) -> None:
            for name, stand_in in stand_ins.items():
                setattr(pipeline, name, stand_in)
            super().__init__(*arguments)

    return FeedActor


def one_by_one(table: pa.Table) -> Iterator[pa.Table]:
    """A table's steps, each as a table of its own."""
    return (table.slice(number, 1) for number in range(table.num_rows))


class SlowPack:
    """`pipeline._Pack` that takes its time, and leaves a file for each step that it begins and makes."""

    def __init__(self, folder: str, seconds: float, config: Any) -> None:
        self.folder, self.seconds, self.config = Path(folder), seconds, config

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for encoded in one_by_one(table):
            name = f"{encoded['step'][0].as_py()}-{os.getpid()}"
            (self.folder / f"begun-{name}").touch()
            time.sleep(self.seconds)
            packed = stages.pack_steps(encoded, self.config)
            (self.folder / f"made-{name}").touch()
            yield packed


class Killer(threading.Thread):
    """Kills loading processes at random moments: one in the midst of a step, then one at any work, and so on."""

    def __init__(self, folder: str, num_kills: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.folder, self.num_kills, self.random = Path(folder), num_kills, random.Random(seed)
        self.killed: list[int] = []

    def run(self) -> None:
        while len(self.killed) < self.num_kills:
            time.sleep(self.random.uniform(0, 0.5))
            victims = processes("ray::MapBatches")
            if len(self.killed) % 2 == 0:
                victims = [process for process in victims if process.pid in self.in_the_midst()]
            if victims:
                victim = self.random.choice(victims)
                victim.send_signal(signal.SIGKILL)
                self.killed.append(victim.pid)

    def in_the_midst(self) -> set[int]:
        marks = {file.name for file in self.folder.iterdir()}
        open_steps = [name for name in marks if name.replace("begun", "made") not in marks]
        return {int(name.rpartition("-")[2]) for name in open_steps}


def stream(config: Any, num_cpus: int, layouts: Sequence[Any]) -> list[list[Seen]]:
    """The whole stream for each layout {"pack": …, "stream": …}, over a Ray of so many CPUs."""
    results = []
    with local_ray.running(num_cpus, OBJECT_STORE_BYTES):
        for layout in layouts:
            made = config_of({**config, **layout})
            dataset = pipeline.build(build_manifest(made.sources), made)
            results.append(
                [seen(step) for block in pipeline.blocks(dataset) for step in unpack(block)]
            )
    return results


def attacked(config: Any, run_dir: str, num_kills: int, seed: int) -> dict[str, Any]:
    """A whole run over a feed, while loading processes are killed."""
    made = config_of(config)
    steps = tempfile.mkdtemp(dir=run_dir)
    feed_module.FeedActor = feed_actor_with(_Pack=partial(SlowPack, steps, 0.3))  # type: ignore[misc]
    with local_ray.running(2, OBJECT_STORE_BYTES), opened(made, run_dir) as feed:
        killer = Killer(steps, num_kills, seed)
        killer.start()
        taken = list(follow(feed, made))
        feed.finish()
    return {
        "seen": [
            [report.position.index, report.content.fingerprint, digest] for report, digest in taken
        ],
        "rows": [report.rows.num_read for report, _ in taken],
        "rejected": [[reject.row_id for reject in report.rows.rejects] for report, _ in taken],
        "totals": feed.cursor().ledger_totals,
        "killed": killer.killed,
        "begun": [int(file.name.split("-")[1]) for file in Path(steps).glob("begun-*")],
    }


def consumed(config: Any, run_dir: str) -> list[Seen]:
    """A whole run over a feed."""
    made = config_of(config)
    with local_ray.running(2, OBJECT_STORE_BYTES), opened(made, run_dir) as feed:
        return [
            [report.position.index, report.content.fingerprint, digest]
            for report, digest in follow(feed, made)
        ]


def scraped(config: Any, run_dir: str, seconds_a_step: float) -> dict[str, Any]:
    """A run with a slow trainer, and what the metrics page says meanwhile of the queue."""
    made, port = config_of(config), free_port()
    values: list[float] = []
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(0.1):
            with contextlib.suppress(OSError):
                page = (
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)
                    .read()
                    .decode()
                )
                lines = [
                    line
                    for line in page.splitlines()
                    if line.startswith("ray_miles_data_prefetch_queue_depth{")
                ]
                values.extend(float(line.rpartition(" ")[2]) for line in lines)

    with ray_with_metrics(port):
        addresses = [
            connection.laddr.ip
            for process in psutil.Process().children(recursive=True)
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        ]
        thread = threading.Thread(target=scrape)
        thread.start()
        depths = []
        with opened(made, run_dir) as feed:
            for report, _ in follow(feed, made):
                depths.append(report.timing.queue_depth)
                time.sleep(seconds_a_step)
            over.set()
            thread.join()
    return {"values": values, "depths": depths, "addresses": addresses}


def listening(folder: str, save: str) -> tuple[list[tuple[str, int]], int]:
    """A run of three steps on two ranks that starts a Ray of its own: where its processes listen meanwhile."""
    from tests.integration.test_train import config_in

    addresses: set[tuple[str, int]] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    open_ones = process.net_connections("tcp")
                    addresses.update(
                        tuple(one.laddr) for one in open_ones if one.status == psutil.CONN_LISTEN
                    )

    thread = threading.Thread(target=look)
    thread.start()
    try:
        config = config_in(Path(folder), Path(save), num_rollout=3)
        summary = train(config, Console(file=io.StringIO()))
    finally:
        over.set()
        thread.join()
    return sorted(addresses), summary.num_steps


@contextlib.contextmanager
def ray_with_metrics(port: int) -> Iterator[None]:
    """Start a Ray of this process's own, whose metrics page is on a port."""
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 300},
    )
    try:
        yield
    finally:
        ray.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


SCENARIOS = {
    scenario.__name__: scenario for scenario in (stream, attacked, consumed, scraped, listening)
}


def run(
    name: str,
    arguments: Mapping[str, Any],
    env: Mapping[str, str] | None = None,
    limit: float = 240,
) -> Any:
    """Runs a scenario in a process of its own.

    Args:
        env: beside this process's environment.

    Returns:
        What the scenario returns, and all that its process printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        words = [sys.executable, "-c", "from tests.support.clusters import main; main()"]
        done = subprocess.run(
            [*words, name, json.dumps(arguments), str(answer)],
            capture_output=True,
            text=True,
            timeout=limit,
            cwd=PROJECT,
            env={**environment(), **(env or {})},
        )
        printed = done.stdout + done.stderr
        assert done.returncode == 0, printed
        return json.loads(answer.read_text()), printed


def environment() -> dict[str, str]:
    """This process's, without what would lead to a Ray that is running."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def main() -> None:
    name, arguments, answer = sys.argv[1:]
    Path(answer).write_text(json.dumps(SCENARIOS[name](**json.loads(arguments))))


def with_layout(
    config: DataConfig, dp_size: int, max_tokens_per_gpu: int = 512, **stream: Any
) -> DataConfig:
    return replace(
        config,
        pack=PackConfig(dp_size, max_tokens_per_gpu),
        stream=replace(config.stream, **stream),
    )
