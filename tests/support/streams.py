"""The demo's data as a stream, and the digest by which streams of any layout are compared.

settings = demo_settings(folder)      plain JSON, so that it also goes to other processes
config = config_of(settings)
[seen(step) for step in local(config)]        the definition: the pure stages in this process
with opened(config, run_dir) as feed:         the same over Ray and a feed
    follow(feed, config)
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import ray
import xxhash

from miles.data.config import (
    DataConfig,
    EncodeConfig,
    OrderConfig,
    PackConfig,
    SourceConfig,
    StreamConfig,
)
from miles.data.files.manifest import build_manifest
from miles.data.stream import pipeline, stages
from miles.data.stream.feed import Feed
from miles.data.stream.step_iterator import StepIterator
from miles.data.types import Cursor, MicroBatch, Step, StepReport
from miles.demo import rows
from miles.demo.tokenizer import build_tokenizer

Seen = list[Any]
"""What must be the same of a step everywhere: [step, fingerprint, digest of what the ranks got,
rejected rows, keys that nothing reads]."""

UNREAD_KEY = "mood"

NODE_RANKS = 2
"""Ranks that share a chunk where `follow` reads a feed."""


@cache
def demo_tokenizer() -> Path:
    """Build the demo's tokenizer, once a process; the folder goes when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="miles-demo-tokenizer-")
    _kept.append(folder)
    build_tokenizer(rows.texts(), Path(folder.name) / "tokenizer")
    return Path(folder.name) / "tokenizer"


_kept: list[tempfile.TemporaryDirectory[str]] = []


def demo_settings(folder: Path, **order: Any) -> dict[str, Any]:
    """Copy the demo's two files to a folder: 652 rows, 4 of them broken; two windows an epoch.

    Args:
        order: entries that replace those of the order: two epochs in steps of 64 rows, shuffled.

    Returns:
        The settings that `config_of` takes; plain JSON.
    """
    files = rows.copy_rows(folder / "rows")
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
        "encode": {"tokenizer": str(demo_tokenizer()), "max_sample_tokens": 256},
        "pack": {"dp_size": 2, "max_tokens_per_gpu": 512},
        "stream": {},
    }


def add_unread_keys(settings: Mapping[str, Any]) -> None:
    """Give the first turn of every fifth row of the first source a key that nothing reads."""
    path = Path(next(iter(settings["sources"].values())))
    lines = path.read_text(encoding="utf-8").split("\n")
    for number in range(0, len(lines), 5):
        row = json.loads(lines[number])
        row["conversations"][0][UNREAD_KEY] = "calm"
        lines[number] = json.dumps(row, ensure_ascii=False)
    path.write_text("\n".join(lines), encoding="utf-8")


def config_of(settings: Mapping[str, Any]) -> DataConfig:
    """Return the configuration that settings in plain JSON stand for."""
    return DataConfig(
        sources=tuple(SourceConfig(name, (path,)) for name, path in settings["sources"].items()),
        order=OrderConfig(**settings["order"]),
        encode=EncodeConfig(**settings["encode"]),
        pack=PackConfig(**settings["pack"]),
        stream=StreamConfig(**settings["stream"]),
    )


def with_layout(
    config: DataConfig, dp_size: int, max_tokens_per_gpu: int = 512, **stream: Any
) -> DataConfig:
    """Return the configuration for another number of ranks, and other settings of the stream."""
    return replace(
        config,
        pack=PackConfig(dp_size, max_tokens_per_gpu),
        stream=replace(config.stream, **stream),
    )


def delivered(ranks: Iterable[Iterable[MicroBatch]]) -> str:
    """Return a digest of a step as its ranks got it: each sample by itself, sorted by row.

    The digest does not depend on the layout.
    """
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
        digest.update(str(row_id).encode())
        for part in parts:
            digest.update(part)
    return digest.hexdigest()


def seen(step: Step) -> Seen:
    """Return what must be the same of a step everywhere."""
    return seen_of(step.report, delivered(step.micro_batches))


def seen_of(report: StepReport, digest: str) -> Seen:
    """Return the same of a step whose report and digest (`delivered`) are known."""
    rows = report.rows
    return [
        report.position.index,
        report.content.fingerprint,
        digest,
        [[reject.row_id, reject.reason, reject.detail] for reject in rows.rejects],
        [[count.source_id, count.key, count.num_rows] for count in rows.unused_keys],
    ]


def trained_rows(step: Step) -> list[int]:
    """Return the rows of a step's samples, where no row becomes several samples."""
    return [
        int(row)
        for rank in step.micro_batches
        for batch in rank
        for row in batch.row_ids
        if row >= 0
    ]


def local(config: DataConfig, start_row: int = 0) -> list[Step]:
    """Return all steps from a row on, made by the pure stages in this process."""
    return list(stages.local_steps(build_manifest(config.sources), config, start_row))


@contextlib.contextmanager
def opened(
    config: DataConfig,
    run_dir: str,
    cursor: Cursor | None = None,
    loader: pipeline.LoaderStages = pipeline.LOADER,
) -> Iterator[Feed]:
    """Open a feed for as many ranks as the configuration has; close it at the end."""
    feed = Feed.open(
        config,
        cursor=cursor,
        cursor_path="there",
        num_ranks=config.pack.dp_size,
        run_dir=run_dir,
        loader=loader,
    )
    try:
        yield feed
    finally:
        feed.close()


def follow(
    feed: Feed, config: DataConfig, num_steps: int | None = None, *, is_slow: bool = False
) -> Iterator[tuple[StepReport, str]]:
    """Read a feed as trainers do, all ranks in this process, and commit each step.

    Args:
        num_steps: how many steps to read; None: all.
        is_slow: be a trainer slower than the stream: take a step when the queue is full again.

    Yields:
        The step's report, and the digest of what its ranks got.
    """
    last = feed.info.num_steps if num_steps is None else feed.first_step + num_steps
    ranks = range(config.pack.dp_size)
    iterators = []
    for rank in ranks:
        node = [neighbour for neighbour in ranks if neighbour // NODE_RANKS == rank // NODE_RANKS]
        iterators.append(StepIterator(feed.handle, rank, rank, feed.first_step, last, node))
    for step in range(feed.first_step, last):
        given = [next(iterator) for iterator in iterators]
        assert {report.position.index for report, _ in given} == {step}
        assert len({report.content.fingerprint for report, _ in given}) == 1
        yield feed.commit(step), delivered(batches for _, batches in given)
        if is_slow:
            wait_until_ready(feed, step + config.stream.prefetch_steps)


def wait_until_ready(feed: Feed, step: int) -> None:
    """Wait until the feed holds a step, or the last one; the wait measures nothing."""
    ray.get(feed.handle.fetch.remote(min(step, feed.info.num_steps - 1), 0, [0]))
