"""The feed's queue by itself: what it measures, what it holds, what it says when nothing comes."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

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
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.notebook.dataset import prepare
from miles.data.packing.shards import unpack
from miles.data.stream import feed as feed_module
from miles.data.stream import stages
from miles.data.stream.feed import Feed, FeedActor, StepIterator
from miles.demo import rows
from miles.demo.tokenizer import build_tokenizer
from miles.errors import CheckpointError, ClusterError, SourceError, TemplateError
from tests.integration.test_order import as_parquet, made_up_rows


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("feed")
    files = rows.copy_rows(folder / "rows")
    build_tokenizer(rows.texts(), folder / "tokenizer")
    return DataConfig(
        sources=(SourceConfig("chat", (str(files["chat"]),)),),
        order=OrderConfig(batch_size=64),
        encode=EncodeConfig(str(folder / "tokenizer"), max_sample_tokens=256),
        pack=PackConfig(dp_size=2, max_tokens_per_gpu=512),
        stream=StreamConfig(prefetch_steps=3),
    )


class ByHand(FeedActor):
    """The actor's class in this process, given its blocks one by one."""

    def _produce(self, manifest: Any, start_row: int) -> None:
        pass

    def give(self, *rows: pa.Table) -> None:
        self._add(pa.concat_tables(rows))

    def end(self) -> None:
        with self._came:
            self._error = ClusterError("the stream is at its end")


@pytest.fixture(scope="module")
def manifest(config: DataConfig) -> Manifest:
    return build_manifest(config.sources)


@pytest.fixture(scope="module")
def packed(config: DataConfig, manifest: Manifest) -> list[pa.Table]:
    """The steps as the stream would give them, made without Ray."""
    plan, formats = stages.make_plan(manifest, config), stages.source_formats(manifest)
    encoder = stages.encoder_of(config.encode)
    tables = [
        stages.pack_steps(stages.encode_steps(raw, formats, encoder), config.pack)
        for ref in plan.windows(0)
        for raw in stages.read_window(manifest, plan, ref, 0)
    ]
    return [table.slice(number, 1) for table in tables for number in range(table.num_rows)]


@pytest.fixture
def actor(config: DataConfig, manifest: Manifest) -> ByHand:
    return ByHand(manifest, config, 0, 2)


def in_thread(call: Any, *arguments: Any) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call(*arguments)), daemon=True)
    thread.start()
    time.sleep(0.1)
    return thread, results


def test_depth_is_zero_where_any_rank_waited_though_a_later_one_found_the_step(
    actor: ByHand, packed: list[pa.Table]
) -> None:
    waiting, fetched = in_thread(actor.fetch, 0, 1, 1)
    actor.begin(0)  # rank 1 says that it waits
    time.sleep(0.1)
    actor.give(packed[0])
    actor.begin(0)  # rank 0 comes later, and finds it
    waiting.join(10)
    assert len(fetched) == 1
    assert actor.report(0).timing.queue_depth == 0
    assert actor.report(0).timing.wait_seconds > 0.05


def test_depth_counts_what_is_ready_and_nothing_was_waited_for(
    actor: ByHand, packed: list[pa.Table]
) -> None:
    actor.give(*packed[:2])
    actor.give(packed[2])
    actor.begin(0)
    assert (actor.report(0).timing.queue_depth, actor.report(0).timing.wait_seconds) == (3, 0.0)
    actor.begin(2)  # a rank that is ahead of the others
    actor.begin(1)
    assert actor.report(1).timing.queue_depth == 2
    assert actor.report(2).timing.queue_depth == 1
    assert actor.report(2).content.fingerprint == unpack(packed[2])[0].fingerprint


def test_of_a_stream_at_its_end_a_step_is_reported_when_it_was_measured(
    actor: ByHand, packed: list[pa.Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    actor.give(*packed[:2])
    actor.end()
    committing, reports = in_thread(actor.report, 0)
    assert not reports, "what begins the step may come after the question"
    actor.begin(0)
    committing.join(10)
    assert [report.timing.queue_depth for report in reports] == [2]
    with pytest.raises(ClusterError, match="at its end"):
        actor.report(2)
    monkeypatch.setattr(feed_module, "REPORT_SECONDS", 0.1)
    with pytest.raises(ClusterError, match="at its end"):
        actor.report(1)


def test_read_ahead_is_no_need_and_measures_nothing(actor: ByHand, packed: list[pa.Table]) -> None:
    waiting, _ = in_thread(actor.fetch, 0, 0, 0)
    actor.give(*packed[:3])
    waiting.join(10)
    actor.begin(0)
    assert (actor.report(0).timing.queue_depth, actor.report(0).timing.wait_seconds) == (3, 0.0)


def test_it_takes_no_block_while_enough_is_ready_and_lets_chunks_go(
    actor: ByHand, packed: list[pa.Table]
) -> None:
    """Blocks of two steps, a bound of three: the second block is taken, and the third waits."""
    pairs = [packed[i : i + 2] for i in range(0, len(packed), 2)]
    producing, _ = in_thread(lambda: [actor.give(*pair) for pair in pairs])
    assert (actor._newest, len(actor._held)) == (3, 2)
    chunk = ray.get(actor.fetch(0, 0, 0)[0])
    assert [report.position.index for report in chunk.reports] == [0, 1]
    actor.fetch(1, 1, 1)
    assert [held.first_step for held in actor._held] == [0, 2], "fetched, and still needed"
    depths = []
    for step in range(len(packed)):
        actor.begin(step)
        depths.append(actor.report(step).timing.queue_depth)
        for rank in (0, 1):
            if step % 2 == 0 and step > 0:
                actor.fetch(step, rank, rank)
        time.sleep(0.05)
        assert actor._newest - step <= 4
        assert len(actor._held) <= 3
    producing.join(10)
    with pytest.raises(ClusterError, match="step 0 of the data stream is gone"):
        actor.fetch(0, 0, 0)
    assert [held.last_step for held in actor._held] == [len(packed) - 1]
    assert depths == [3] * (len(packed) - 2) + [2, 1]


def test_a_wait_has_a_limit_and_says_what_for(
    actor: ByHand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "WAIT_SECONDS", 0.2)
    said: list[str] = []

    def read_ahead() -> None:
        try:
            actor.fetch(3, 1, 0)
        except ClusterError as error:
            said.append(str(error))

    reading, _ = in_thread(read_ahead)
    time.sleep(0.5)
    assert not said, "nobody needs the step yet"
    actor.begin(0)
    reading.join(10)
    assert said == ["waited 0.2 seconds for step 0 of the data stream"]


def open_feed(config: DataConfig, folder: Path, num_ranks: int = 1) -> Feed:
    return Feed.open(config, cursor=None, cursor_path="-", num_ranks=num_ranks, run_dir=str(folder))


def test_beyond_its_end_the_stream_says_so_and_a_closed_feed_too(
    config: DataConfig, tmp_path: Path
) -> None:
    feed = open_feed(config, tmp_path)
    count = feed.info.num_steps
    assert len(list(StepIterator(feed.handle, 0, 0, 0, count))) == count
    with pytest.raises(ClusterError, match=f"ended with step {count - 1}"):
        next(StepIterator(feed.handle, 0, 0, count, count + 1))
    for step in range(count):
        feed.commit(step)
    feed.finish()
    assert feed.cursor().consumed_rows == feed.info.num_rows
    first = (tmp_path / "first_batch.json").read_text()
    assert '"micro_batches"' in first, "kept, though the step itself was let go long ago"
    feed.close()
    with pytest.raises(ClusterError):
        next(StepIterator(feed.handle, 0, 0, 0, count))
    with pytest.raises(ClusterError):
        feed.commit(count - 1)


def test_a_file_that_changes_under_the_stream_reaches_the_rank_by_name(
    config: DataConfig, tmp_path: Path
) -> None:
    copy = tmp_path / "rows.jsonl"
    copy.write_bytes(rows.paths()["chat"].read_bytes())
    manifest = build_manifest((SourceConfig("chat", (str(copy),)),))
    copy.write_bytes(copy.read_bytes() + b"\n{}")
    actor = FeedActor(manifest, config, 0, 1)
    for _ in range(2):
        with pytest.raises(SourceError, match=r"rows\.jsonl"):
            actor.fetch(0, 0, 0)


def test_a_huge_row_group_is_refused_and_what_prepare_makes_of_it_is_not(
    config: DataConfig, tmp_path: Path
) -> None:
    huge = str(tmp_path / "huge.parquet")
    as_parquet(Path(huge), made_up_rows(2_100), 10_000)

    def on(path: str, window_rows: int) -> DataConfig:
        order = OrderConfig(batch_size=64, shuffle=True, window_rows=window_rows)
        return dataclasses.replace(
            config, sources=(SourceConfig("huge", (path,)),), order=order, max_bad_fraction=0.1
        )

    with pytest.raises(
        SourceError,
        match=r"huge\.parquet: row group 0 has 2,100 rows .*miles prepare huge --source",
    ):
        open_feed(on(huge, 512), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "before anything is started or written"
    prepared = prepare("huge", source=huge, tokenizer=config.encode.tokenizer, max_bad_fraction=0.1)
    prepared.write(str(tmp_path / "rewritten"))
    feed = open_feed(on(str(tmp_path / "rewritten"), 512), tmp_path / "run")
    steps = list(StepIterator(feed.handle, 0, 0, 0, feed.info.num_steps))
    feed.close()
    assert (
        sum(report.rows.num_read for report, _ in steps)
        == len(prepared.summary().lengths)
        == 2_100 - 73
    )


def test_a_template_is_certified_before_any_actor_starts(
    config: DataConfig, tmp_path: Path
) -> None:
    def open_feed(template: str | None) -> Feed:
        encode = dataclasses.replace(config.encode, chat_template=template)
        changed = dataclasses.replace(config, encode=encode)
        return Feed.open(changed, cursor=None, cursor_path="", num_ranks=1, run_dir=str(tmp_path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed_module.ray, "remote", lambda **_: pytest.fail("an actor was made"))
        with pytest.raises(
            TemplateError, match="the chat template that was given cannot be certified"
        ):
            open_feed("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    feed = open_feed(None)
    feed.close()
    (tmp_path / "certificate.json").rename(tmp_path / "kept.json")
    other = dataclasses.replace(feed.cursor(), seed=9)
    with pytest.raises(CheckpointError, match="seed"):
        Feed.open(config, cursor=other, cursor_path="there", num_ranks=1, run_dir=str(tmp_path))
    assert not (tmp_path / "certificate.json").exists(), "of a run that is refused"
    certificate = json.loads((tmp_path / "kept.json").read_text())
    assert certificate["terminator"] == "<|im_end|>"
    assert certificate["engine"] == "tiktoken"


def test_a_cluster_too_small_for_the_loader_is_refused(config: DataConfig, tmp_path: Path) -> None:
    large = dataclasses.replace(config, stream=StreamConfig(loader_cpus=64))
    with pytest.raises(ClusterError, match="--loader-cpus 64"):
        open_feed(large, tmp_path)
