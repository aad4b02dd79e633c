"""What dies is either made good, or ends the run soon, with one clear error that a restart can go on from."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from miles.data.config import DataConfig, StreamConfig
from miles.data.files.manifest import build_manifest
from miles.data.stream import feed as feed_module
from miles.data.stream import pipeline, stages
from miles.data.stream.feed import Feed, StepIterator
from miles.data.types import Cursor
from miles.errors import ClusterError, MilesError
from tests.support.clusters import (
    config_of,
    demo_settings,
    feed_actor_with,
    follow,
    local,
    one_by_one,
    opened,
    processes,
    seen,
    with_layout,
)
from tests.support.fault_table import SINCE, observed

SOON_SECONDS = 60.0
"""Far above what it takes to notice a death, far below what anybody waits for on purpose."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return demo_settings(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def config(settings: dict[str, Any]) -> DataConfig:
    """One rank, and blocks of a step, so that a step does not wait for what follows it."""
    return with_layout(config_of(settings), 1, target_block_bytes=1)


# --- the feed


class StuckPack:
    """Packs, and comes to a stand before a step."""

    def __init__(self, step: int, config: Any) -> None:
        self.step, self.config = step, config

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for packed in one_by_one(stages.pack_steps(table, self.config)):
            if packed["step"][0].as_py() == self.step:
                time.sleep(10 * SOON_SECONDS)
            yield packed


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """A call that is under way; its result or error when the thread has ended."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


def ray_kill(feed: Feed) -> None:
    ray.kill(feed.handle)


def sigkill(feed: Feed) -> None:
    (process,) = processes("ray::FeedActor")
    process.send_signal(signal.SIGKILL)


def soon(thread: threading.Thread, outcome: list[Any]) -> Any:
    thread.join(SOON_SECONDS)
    assert outcome, "it still waits"
    return outcome[0]


@pytest.mark.slow
@pytest.mark.parametrize("kill", [ray_kill, sigkill])
def test_a_feed_that_dies_ends_the_wait_soon_and_the_run_goes_on_from_its_cursor(
    config: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill: Callable[[Feed], None],
) -> None:
    unbroken = [seen(step) for step in local(config)]
    with monkeypatch.context() as patch:
        patch.setattr(feed_module, "FeedActor", feed_actor_with(_Pack=partial(StuckPack, 3)))
        feed = Feed.open(config, cursor=None, cursor_path="", num_ranks=1, run_dir=str(tmp_path))
    iterator = StepIterator(feed.handle, 0, 0, 0, feed.info.num_steps)
    for step in range(3):
        next(iterator)
        if step < 2:
            feed.commit(step)
    thread, outcome = in_thread(lambda: next(iterator))
    time.sleep(0.5)
    assert not outcome, "there is no step 3 to be had"
    kill(feed)
    error = soon(thread, outcome)
    assert isinstance(error, ClusterError), error
    assert "FeedActor" in str(error)
    with pytest.raises(ClusterError, match="FeedActor"):
        feed.commit(2)
    cursor = Cursor.from_json(feed.cursor().to_json(), "there")
    feed.close()
    with opened(config, str(tmp_path), cursor) as again:
        assert again.first_step == 2
        assert [
            [report.position.index, report.content.fingerprint, digest]
            for report, digest in follow(again, config)
        ] == unbroken[2:]


@pytest.mark.slow
def test_a_feed_that_dies_while_a_step_is_committed_is_an_error_soon(
    config: DataConfig, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        feed = stack.enter_context(opened(config, str(tmp_path)))
        iterator = StepIterator(feed.handle, 0, 0, 0, feed.info.num_steps)
        next(iterator)
        feed.commit(0)
        next(iterator)
        (process,) = processes("ray::FeedActor")
        process.suspend()
        thread, outcome = in_thread(lambda: feed.commit(1))
        time.sleep(0.5)
        assert not outcome, "nobody answers it"
        process.send_signal(signal.SIGKILL)
        error = soon(thread, outcome)
    assert isinstance(error, ClusterError), error
    assert "FeedActor" in str(error)
    assert feed.cursor().consumed_rows == config.order.batch_size, "the step was not entered"


# --- a row that kills its worker


class PoisonedPack:
    """Packs, and dies of one row each time, as a tokenizer's native code might."""

    def __init__(self, folder: str, row_id: int, config: Any) -> None:
        self.folder, self.row_id, self.config = Path(folder), row_id, config

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for packed in one_by_one(stages.pack_steps(table, self.config)):
            if self.row_id in packed["segment_row_ids"][0].as_py():
                (self.folder / f"death-{os.getpid()}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield packed


@pytest.mark.slow
def test_a_row_that_kills_its_worker_each_time_ends_the_run_after_the_retries(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = local(config)
    row_id = int(unbroken[8].micro_batches[0][0].row_ids[0])
    monkeypatch.setattr(
        feed_module,
        "FeedActor",
        feed_actor_with(_Pack=partial(PoisonedPack, str(tmp_path), row_id)),
    )
    config = replace(config, stream=StreamConfig(max_retries=2, target_block_bytes=1))
    taken: list[str] = []
    with opened(config, str(tmp_path)) as feed, pytest.raises(MilesError) as raised:
        taken.extend(
            report.content.fingerprint for report, _ in follow(feed, config)
        )  # what came before stays in the list
    assert "died" in str(raised.value) or "crash" in str(raised.value)
    named = re.search(
        r"step (\d+) was to come next, of 64 rows between row \d+ of \S+ ", str(raised.value)
    )
    assert named, raised.value
    assert int(named[1]) == len(taken), "with the first step that did not come"
    observed(
        "row that kills its loader each time", " ".join(str(raised.value).split()), named[0], SINCE
    )
    assert len(list(tmp_path.glob("death-*"))) == 1 + 2
    assert taken == [step.fingerprint for step in unbroken[: len(taken)]]
    assert len(taken) <= 8, "no step came after the one that could not be had"


def test_a_loader_without_retries_fails_at_the_first_death(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_id = int(local(config)[0].micro_batches[0][0].row_ids[0])
    monkeypatch.setattr(pipeline, "_Pack", partial(PoisonedPack, str(tmp_path), row_id))
    config = replace(config, stream=StreamConfig(max_retries=0))
    with pytest.raises(MilesError):
        list(pipeline.iterate(pipeline.build(build_manifest(config.sources), config)))
    assert len(list(tmp_path.glob("death-*"))) == 1
