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
from miles.data.notebook.prepare import prepare
from miles.data.packing.shards import unpack
from miles.data.stream import feed_actor, stages
from miles.data.stream.feed import Feed
from miles.data.stream.feed_actor import FeedActor
from miles.data.stream.step_iterator import StepIterator
from miles.data.types import Cursor
from miles.demo import rows
from miles.errors import (
    CheckpointError,
    ClusterError,
    DataError,
    LostError,
    RunError,
    SourceError,
    TemplateError,
)
from miles.train.config import TrainConfig
from miles.train.driver.cluster import ray_cluster
from tests.support.processes import LIMIT_SECONDS, wait_until
from tests.support.row_files import random_conversations, write_conversations
from tests.support.streams import config_of, demo_settings, demo_tokenizer, local, opened


@pytest.fixture(scope="module")
def config() -> DataConfig:
    return DataConfig(
        sources=(SourceConfig("chat", (str(rows.paths()["chat"]),)),),
        order=OrderConfig(batch_size=64),
        encode=EncodeConfig(str(demo_tokenizer()), max_sample_tokens=256),
        pack=PackConfig(dp_size=2, max_tokens_per_gpu=512),
        stream=StreamConfig(prefetch_steps=3),
    )


class ByHand(FeedActor):
    """The actor's class in this process, given its blocks one by one."""

    def run_stream(self, manifest: Any, start_row: int) -> None:
        """Nothing comes by itself."""

    def give(self, *rows: pa.Table) -> None:
        self.put(pa.concat_tables(rows))


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
    """Start a call in a thread; its result is in the list when the thread has ended."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call(*arguments)), daemon=True)
    thread.start()
    return thread, results


def test_depth_is_zero_where_any_rank_waited(actor: ByHand, packed: list[pa.Table]) -> None:
    """Also where a later rank finds the step."""
    waiting, fetched = in_thread(actor.fetch, 0, 1, [1])
    actor.begin(0)  # rank 1 has to wait
    time.sleep(0.1)
    actor.give(packed[0])
    actor.begin(0)  # rank 0 comes later, and finds it
    waiting.join(LIMIT_SECONDS)
    assert len(fetched) == 1
    assert actor.commit(0).timing.queue_depth == 0
    assert actor.commit(0).timing.wait_seconds > 0.05


def test_depth_counts_ready_steps(actor: ByHand, packed: list[pa.Table]) -> None:
    actor.give(*packed[:2])
    actor.give(packed[2])
    actor.begin(0)
    assert (actor.commit(0).timing.queue_depth, actor.commit(0).timing.wait_seconds) == (3, 0.0)
    actor.begin(2)  # a rank that is ahead of the others
    actor.begin(1)
    assert actor.commit(1).timing.queue_depth == 2
    assert actor.commit(2).timing.queue_depth == 1
    assert actor.commit(2).content.fingerprint == unpack(packed[2])[0].fingerprint


def test_last_steps_are_reported_once_measured(
    actor: ByHand, packed: list[pa.Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    actor.give(*packed[:2])
    actor.end(RunError("the stream is at its end"))
    committing, reports = in_thread(actor.commit, 0)
    assert not reports, "what begins the step may come after the question"
    actor.begin(0)
    committing.join(LIMIT_SECONDS)
    assert [report.timing.queue_depth for report in reports] == [2]
    with pytest.raises(RunError, match="at its end"):
        actor.commit(2)
    monkeypatch.setattr(feed_actor, "REPORT_SECONDS", 0.1)
    with pytest.raises(RunError, match="at its end"):
        actor.commit(1)


def test_reading_ahead_measures_nothing(actor: ByHand, packed: list[pa.Table]) -> None:
    waiting, _ = in_thread(actor.fetch, 0, 0, [0])
    actor.give(*packed[:3])
    waiting.join(LIMIT_SECONDS)
    actor.begin(0)
    assert (actor.commit(0).timing.queue_depth, actor.commit(0).timing.wait_seconds) == (3, 0.0)


def test_window_is_bounded_and_lets_chunks_go(actor: ByHand, packed: list[pa.Table]) -> None:
    """With blocks of two steps and a bound of three, the second block is taken, the third waits."""
    last = len(packed) - 1
    ready = actor._ready
    pairs = [packed[i : i + 2] for i in range(0, len(packed), 2)]
    producing, _ = in_thread(lambda: [actor.give(*pair) for pair in pairs])
    wait_until(lambda: ready.newest >= 3)
    assert (ready.newest, len(ready.held_steps)) == (3, 2)

    chunk = ray.get(actor.fetch(0, 0, [0])[0])
    assert [report.position.index for report in chunk.reports] == [0, 1]

    actor.fetch(1, 1, [1])
    assert ready.held_steps == [(0, 1), (2, 3)], "fetched, and still needed"

    depths = []
    for step in range(len(packed)):
        actor.begin(step)
        depths.append(actor.commit(step).timing.queue_depth)
        for rank in (0, 1):
            if step % 2 == 0 and step > 0:
                actor.fetch(step, rank, [rank])
        wait_until(lambda step=step: ready.newest >= min(step + 3, last))
        assert ready.newest - step <= 4
        assert len(ready.held_steps) <= 3

    producing.join(LIMIT_SECONDS)
    with pytest.raises(RunError, match="step 0 of the data stream is gone"):
        actor.fetch(0, 0, [0])
    assert [end for _, end in ready.held_steps] == [last]
    assert depths == [3] * (len(packed) - 2) + [2, 1]


def test_wait_has_a_limit(actor: ByHand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_actor, "WAIT_SECONDS", 0.2)
    errors: list[str] = []

    def read_ahead() -> None:
        try:
            actor.fetch(3, 1, [0])
        except LostError as error:
            errors.append(str(error))

    reading, _ = in_thread(read_ahead)
    time.sleep(0.5)
    assert not errors, "nobody needs the step yet"
    actor.begin(0)
    reading.join(LIMIT_SECONDS)
    assert errors == ["waited 0.2 seconds for step 0 of the data stream"]


def open_feed(config: DataConfig, folder: Path, num_ranks: int = 1) -> Feed:
    return Feed.open(config, cursor=None, cursor_path="-", num_ranks=num_ranks, run_dir=str(folder))


def test_end_of_stream_is_an_error(config: DataConfig, tmp_path: Path) -> None:
    feed = open_feed(config, tmp_path)
    count = feed.info.num_steps
    assert len(list(StepIterator(feed.handle, 0, 0, 0, count))) == count

    with pytest.raises(RunError, match=f"ended with step {count - 1}"):
        next(StepIterator(feed.handle, 0, 0, count, count + 1))
    for step in range(count):
        feed.commit(step)
    feed.finish()
    assert feed.cursor().consumed_rows == feed.info.num_rows

    first = (tmp_path / "first_batch.json").read_text()
    assert '"micro_batches"' in first, "kept, though the step itself was let go long ago"

    feed.close()
    with pytest.raises(LostError):
        next(StepIterator(feed.handle, 0, 0, 0, count))

    with pytest.raises(LostError):
        feed.commit(count - 1)


def test_bad_rows_are_judged_where_an_epoch_ends(config: DataConfig, tmp_path: Path) -> None:
    """However few rows there are, and before a checkpoint of the last step could be begun."""
    good = {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant")]}
    bad = {"messages": good["messages"][:1]}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (bad, *[good] * 5)))
    few = dataclasses.replace(
        config,
        sources=(SourceConfig("few", (str(file),)),),
        order=OrderConfig(batch_size=2, num_epoch=2),
    )

    feed = open_feed(few, tmp_path / "run")
    assert len(list(StepIterator(feed.handle, 0, 0, 0, 3))) == 3
    feed.commit(0)
    feed.commit(1)
    with pytest.raises(DataError, match="1 of the 6 rows read were dropped, more than"):
        feed.commit(2)
    feed.close()


def test_rank_learns_which_file_changed(config: DataConfig, tmp_path: Path) -> None:
    copy = tmp_path / "rows.jsonl"
    copy.write_bytes(rows.paths()["chat"].read_bytes())
    manifest = build_manifest((SourceConfig("chat", (str(copy),)),))
    copy.write_bytes(copy.read_bytes() + b"\n{}")
    actor = FeedActor(manifest, config, 0, 1)
    for _ in range(2):
        with pytest.raises(SourceError, match=r"rows\.jsonl"):
            actor.fetch(0, 0, [0])


def test_huge_row_group_is_refused(config: DataConfig, tmp_path: Path) -> None:
    huge = str(tmp_path / "huge.parquet")
    write_conversations(Path(huge), random_conversations(2_100), 10_000)

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


def test_template_is_certified_before_any_actor(config: DataConfig, tmp_path: Path) -> None:
    def open_feed(template: str | None) -> Feed:
        encode = dataclasses.replace(config.encode, chat_template=template)
        changed = dataclasses.replace(config, encode=encode)
        return Feed.open(changed, cursor=None, cursor_path="", num_ranks=1, run_dir=str(tmp_path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "remote", lambda **_: pytest.fail("an actor was made"))
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
    assert certificate["engine"].startswith(("fastokens", "tiktoken"))


def test_too_small_cluster_is_refused(config: DataConfig, tmp_path: Path) -> None:
    large = dataclasses.replace(config, stream=StreamConfig(loader_cpus=64))
    with pytest.raises(ClusterError, match="--loader-cpus 64"):
        open_feed(large, tmp_path)

    greedy = dataclasses.replace(
        config, stream=StreamConfig(loader_cpus=3), pack=PackConfig(1, 512)
    )
    run = TrainConfig(hf_checkpoint="hf", ref_load="megatron", save=str(tmp_path), data=greedy)
    with (
        pytest.raises(ClusterError, match="2 CPUs; the trainers and --loader-cpus 3 need 3"),
        ray_cluster(run),
    ):
        pass


# --- ranks in processes of their own


@ray.remote(num_cpus=0)
class Consumer:
    """A trainer that only reads."""

    def read(self, handle: Any, rank: int, first: int, last: int) -> list[tuple[int, str]]:
        """Return number and fingerprint of the steps from `first` up to `last`."""
        taken = []
        for report, micro_batches in StepIterator(handle, rank, rank, first, last):
            assert sum(len(batch.input_ids) for batch in micro_batches) > 0
            taken.append((report.position.index, report.content.fingerprint))
        return taken


def test_two_ranks_read_the_same_steps(tmp_path: Path) -> None:
    config = config_of(demo_settings(tmp_path))
    unbroken = [step.report for step in local(config)]
    expected = [(report.position.index, report.content.fingerprint) for report in unbroken]
    consumers = [Consumer.remote() for _ in range(2)]

    def read(feed: Feed, first: int, last: int) -> list[list[tuple[int, str]]]:
        reads = [
            consumer.read.remote(feed.handle, rank, first, last)
            for rank, consumer in enumerate(consumers)
        ]
        taken: list[list[tuple[int, str]]] = ray.get(reads)
        return taken

    with opened(config, str(tmp_path)) as feed:
        assert read(feed, 0, 4) == [expected[:4]] * 2
        for step in range(4):
            report = feed.commit(step)
            assert (report.timing.queue_depth == 0) == (report.timing.wait_seconds > 0)
        cursor = Cursor.from_json(feed.cursor().to_json(), "here")
    assert cursor.consumed_rows == unbroken[3].position.next_row
    assert cursor.tokens_seen == sum(report.content.num_trained_tokens for report in unbroken[:4])
    first_batch = json.loads((tmp_path / "first_batch.json").read_text())
    segments = [segment for batch in first_batch["micro_batches"] for segment in batch]
    assert {segment["source"] for segment in segments} == {"chat", "code"}

    changed = dataclasses.replace(config, order=dataclasses.replace(config.order, seed=5))
    with (
        pytest.raises(CheckpointError, match=r"--rollout-seed: the checkpoint has 3, this run 5"),
        opened(changed, str(tmp_path), cursor),
    ):
        pass
    with opened(config, str(tmp_path), cursor) as feed:
        assert feed.first_step == 4
        assert read(feed, 4, len(unbroken)) == [expected[4:]] * 2
    actors = ray.util.list_named_actors(all_namespaces=True)
    assert not actors, "Ray Data has started none in a Ray that is ours"
