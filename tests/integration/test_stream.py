"""The stream over a real Ray: one order, resumable anywhere, every row once; the feed's queue; prepare."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from miles.data.config import (
    DataConfig,
    EncodeConfig,
    OrderConfig,
    PackConfig,
    SourceConfig,
    StreamConfig,
)
from miles.data.files.manifest import build_manifest
from miles.data.notebook.dataset import prepare
from miles.data.packing import shards
from miles.data.stream import pipeline, stages
from miles.data.stream.feed import Feed, StepIterator
from miles.data.stream.ledger import Ledger
from miles.data.types import Cursor
from miles.demo import rows
from miles.demo.tokenizer import build_tokenizer
from miles.errors import CheckpointError, ConfigError, MilesError, SourceError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """The demo's two files: 652 rows, 4 of them broken, two windows an epoch, two epochs."""
    folder = tmp_path_factory.mktemp("stream")
    files = rows.copy_rows(folder / "rows")
    build_tokenizer(rows.texts(), folder / "tokenizer")
    return DataConfig(
        sources=tuple(SourceConfig(name, (str(file),)) for name, file in files.items()),
        order=OrderConfig(batch_size=64, shuffle=True, seed=3, window_rows=384, num_epoch=2),
        encode=EncodeConfig(str(folder / "tokenizer"), max_sample_tokens=256),
        pack=PackConfig(dp_size=2, max_tokens_per_gpu=512),
    )


@pytest.fixture(scope="module")
def unbroken(config: DataConfig) -> list[Any]:
    """The reports of every step, made in one process without Ray."""
    return [step.report for step in stages.local_steps(build_manifest(config.sources), config)]


def fingerprints(config: DataConfig, start_row: int = 0) -> list[str]:
    stream = pipeline.build(build_manifest(config.sources), config, start_row)
    return [
        report.content.fingerprint
        for block in pipeline.blocks(stream)
        for report in shards.reports(block)
    ]


@pytest.mark.parametrize(
    ("stream", "pack"),
    [
        (StreamConfig(loader_cpus=1), PackConfig(2, 512)),
        (StreamConfig(loader_cpus=2, target_block_bytes=1 << 14), PackConfig(1, 2048)),
        (StreamConfig(loader_cpus=2), PackConfig(4, 256)),
    ],
    ids=["1 cpu", "2 cpus, small blocks, dp 1", "dp 4"],
)
def test_the_order_depends_on_no_cluster_and_no_layout(
    config: DataConfig, unbroken: list[Any], stream: StreamConfig, pack: PackConfig
) -> None:
    got = fingerprints(dataclasses.replace(config, stream=stream, pack=pack))
    assert got == [report.content.fingerprint for report in unbroken]
    assert len(set(got)) == len(got)


def test_another_seed_is_another_order(config: DataConfig, unbroken: list[Any]) -> None:
    other = dataclasses.replace(config, order=dataclasses.replace(config.order, seed=4))
    first = next(stages.local_steps(build_manifest(config.sources), other))
    assert first.fingerprint != unbroken[0].content.fingerprint


def test_resumed_after_every_step_what_follows_is_the_same(
    config: DataConfig, unbroken: list[Any]
) -> None:
    manifest = build_manifest(config.sources)
    for index, report in enumerate(unbroken[:-1]):
        following = next(stages.local_steps(manifest, config, report.position.next_row))
        assert (following.index, following.fingerprint) == (
            index + 1,
            unbroken[index + 1].content.fingerprint,
        )
    middle = len(unbroken) // 2
    assert fingerprints(config, unbroken[middle].position.next_row) == [
        report.content.fingerprint for report in unbroken[middle + 1 :]
    ]


class PackAndDie:
    """Packs, and kills its process when it has come to a step, the first two times."""

    def __init__(self, folder: Path, config: PackConfig) -> None:
        self.folder, self.config = folder, config

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        packed = stages.pack_steps(table, self.config)
        for index, step in enumerate(packed["step"].to_pylist()):
            for number in range(2):
                mark = self.folder / f"killed-{number}"
                if step == 8 and not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            yield packed.slice(index, 1)


def test_a_loader_that_is_killed_changes_neither_order_nor_counts(
    config: DataConfig, unbroken: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of a window: the steps that it had given are neither lost nor counted twice."""
    monkeypatch.setattr(pipeline, "_Pack", partial(PackAndDie, tmp_path))
    manifest = build_manifest(config.sources)
    whole, ledger = (
        Ledger(manifest, str(tmp_path / name), 1.0) for name in ("whole.jsonl", "rejects.jsonl")
    )
    for report in unbroken:
        whole.commit(report.position.index, report.rows)
    got = []
    for row in pipeline.iterate(pipeline.build(manifest, config)):
        got += shards.reports(row)
        ledger.commit(got[-1].position.index, got[-1].rows)
    assert (tmp_path / "killed-1").exists(), "no loader was killed"
    assert [report.content.fingerprint for report in got] == [
        report.content.fingerprint for report in unbroken
    ]
    assert [report.rows.rejects for report in got] == [report.rows.rejects for report in unbroken]
    assert ledger.totals() == whole.totals()
    assert sum(counts["read"] for counts in ledger.totals().values()) == 2 * manifest.num_rows
    assert (tmp_path / "rejects.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert ledger.num_rejected == 2 * len(ledger.rejects) == 8


def test_every_row_comes_once_an_epoch_trained_or_named(config: DataConfig) -> None:
    manifest = build_manifest(config.sources)
    seen: list[int] = []
    for step in stages.local_steps(manifest, config):
        seen += [
            int(row)
            for rank in step.micro_batches
            for one in rank
            for row in one.row_ids
            if row >= 0
        ]
        seen += [reject.row_id for reject in step.report.rows.rejects]
        assert len({len(rank) for rank in step.micro_batches}) == 1
    assert np.array_equal(np.bincount(seen), np.full(manifest.num_rows, config.order.num_epoch))


@ray.remote(num_cpus=0)
class Consumer:
    """A trainer that only reads."""

    def read(
        self, handle: Any, rank: int, first: int, count: int, seconds: float
    ) -> list[tuple[int, str]]:
        got = []
        for report, micro_batches in StepIterator(handle, rank, rank, first, count):
            assert sum(len(one.input_ids) for one in micro_batches) > 0
            got.append((report.position.index, report.content.fingerprint))
            time.sleep(seconds)
        return got


def open_feed(config: DataConfig, run_dir: Path, cursor: Cursor | None = None) -> Feed:
    return Feed.open(
        config, cursor=cursor, cursor_path="the checkpoint", num_ranks=2, run_dir=str(run_dir)
    )


def test_two_ranks_read_the_same_steps_and_a_slow_trainer_fills_the_queue(
    config: DataConfig, unbroken: list[Any], tmp_path: Path
) -> None:
    config = dataclasses.replace(config, stream=StreamConfig(prefetch_steps=3))
    feed = open_feed(config, tmp_path)
    consumers = [Consumer.remote() for _ in range(2)]
    count = len(unbroken)
    got = ray.get(
        [one.read.remote(feed.handle, rank, 0, count, 0.15) for rank, one in enumerate(consumers)]
    )
    measured = [feed.commit(step) for step in range(count)]
    feed.close()
    for steps in got:
        assert steps == [(report.position.index, report.content.fingerprint) for report in unbroken]
    depths = [report.timing.queue_depth for report in measured]
    assert depths[0] == 0, "nothing can be ready before the stream has begun"
    assert measured[0].timing.wait_seconds > 0, "so the first step was waited for"
    assert max(depths) == 3
    assert all(
        (report.timing.queue_depth == 0) == (report.timing.wait_seconds > 0) for report in measured
    )


def test_the_cursor_resumes_and_refuses_other_settings(
    config: DataConfig, unbroken: list[Any], tmp_path: Path
) -> None:
    feed = open_feed(config, tmp_path)
    readers = [Consumer.remote() for _ in range(2)]
    for step in range(4):
        ray.get(
            [
                one.read.remote(feed.handle, rank, step, step + 1, 0.0)
                for rank, one in enumerate(readers)
            ]
        )
        feed.commit(step)
    cursor = Cursor.from_json(feed.cursor().to_json(), "here")
    feed.close()
    assert cursor.consumed_rows == unbroken[3].position.next_row
    assert cursor.tokens_seen == sum(report.content.num_trained_tokens for report in unbroken[:4])
    first = json.loads((tmp_path / "first_batch.json").read_text())
    assert {segment["source"] for batch in first["micro_batches"] for segment in batch} == {
        "chat",
        "code",
    }

    other = dataclasses.replace(config, order=dataclasses.replace(config.order, seed=5))
    with pytest.raises(CheckpointError, match=r"seed: the checkpoint has 3, this run 5"):
        open_feed(other, tmp_path, cursor)
    resumed = open_feed(config, tmp_path, cursor)
    assert resumed.first_step == 4
    got = ray.get(
        [
            one.read.remote(resumed.handle, rank, 4, len(unbroken), 0.0)
            for rank, one in enumerate(readers)
        ]
    )[0]
    resumed.close()
    assert [step[1] for step in got] == [report.content.fingerprint for report in unbroken[4:]]


def test_a_source_that_changed_reaches_the_trainer_as_our_error(
    config: DataConfig, tmp_path: Path
) -> None:
    copy = tmp_path / "rows.jsonl"
    copy.write_bytes(rows.paths()["chat"].read_bytes())
    changed = dataclasses.replace(config, sources=(SourceConfig("chat", (str(copy),)),))
    manifest = build_manifest(changed.sources)
    copy.write_bytes(copy.read_bytes() + b"\n{}")
    with pytest.raises(SourceError, match=r"rows\.jsonl"):
        list(pipeline.iterate(pipeline.build(manifest, changed)))


def test_prepare_writes_what_reads_back_to_the_same_tokens(
    config: DataConfig, tmp_path: Path
) -> None:
    tokenizer = config.encode.tokenizer
    ds = prepare(
        "chat", source=str(rows.paths()["chat"]), tokenizer=tokenizer, max_sample_tokens=256
    )
    ds.write(str(tmp_path / "out"))
    assert [(entry["row"], entry["reason"]) for entry in ds.ledger()] == [
        (151, "no_messages"),
        (333, "unknown_role"),
    ]
    again = prepare(
        "chat", source=str(tmp_path / "out"), tokenizer=tokenizer, max_sample_tokens=256
    )
    assert again.num_rows == ds.num_rows - 2
    kept = [
        [one.input_ids[one.loss_mask > 0] for one in rank]
        for data in (ds, again)
        for step in data.steps(batch_size=1000, max_tokens_per_gpu=100_000, shuffle=False)
        for rank in step.micro_batches
    ]
    np.testing.assert_array_equal(np.concatenate(kept[0]), np.concatenate(kept[1]))
    with pytest.raises(ConfigError, match="lies in the folder to write"):
        again.write(str(tmp_path / "out"))
    assert (tmp_path / "out/part-00000.parquet").exists()
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["rows"] == summary["written"] + 2
    assert "412 in 1 file" in repr(ds)
    assert "<table>" in ds._repr_html_()
    assert ds.to_ray().count() == 410


def test_a_missing_source_and_a_wrong_tokenizer_are_named(
    config: DataConfig, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="nowhere"):
        prepare("x", source=str(tmp_path / "nowhere.parquet"), tokenizer=config.encode.tokenizer)
    with pytest.raises(MilesError, match="tokenizer"):
        prepare("x", source=str(rows.paths()["chat"]), tokenizer=str(tmp_path))


def test_a_cluster_that_cannot_hold_the_loader_is_refused(
    config: DataConfig, tmp_path: Path
) -> None:
    from miles.errors import ClusterError
    from miles.train.config import TrainConfig
    from miles.train.driver.loop import ray_cluster

    greedy = dataclasses.replace(
        config, stream=StreamConfig(loader_cpus=3), pack=PackConfig(1, 512)
    )
    run = TrainConfig(hf_checkpoint="hf", ref_load="megatron", save=str(tmp_path), data=greedy)
    with (
        pytest.raises(ClusterError, match="2 CPUs; the trainers and --loader-cpus 3 need 3"),
        ray_cluster(run),
    ):
        pass
