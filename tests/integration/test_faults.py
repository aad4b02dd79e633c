"""What dies is either made good, or ends the run soon, with one clear error that a restart can go
on from.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

from miles.data.config import DataConfig, StreamConfig
from miles.data.files.manifest import build_manifest
from miles.data.packing import shards
from miles.data.stream import pipeline
from miles.data.stream.feed import Feed
from miles.data.stream.ledger import Ledger
from miles.data.stream.reject_limits import RejectLimits
from miles.data.stream.step_iterator import StepIterator
from miles.data.types import Cursor
from miles.errors import LostError, RunError
from tests.support.fault_table import SINCE, observed
from tests.support.processes import LIMIT_SECONDS, processes
from tests.support.stand_ins import MortalPack, PoisonedPack, RaisingPack, StuckPack
from tests.support.streams import (
    config_of,
    demo_settings,
    follow,
    local,
    opened,
    seen,
    seen_of,
    with_layout,
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return demo_settings(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def config(settings: dict[str, Any]) -> DataConfig:
    """One rank, and blocks of a step, so that a step does not wait for what follows it."""
    return with_layout(config_of(settings), 1, target_block_bytes=1)


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


def outcome_of(thread: threading.Thread, outcome: list[Any]) -> Any:
    """Wait for a call's result or error: far longer than it takes, far less than a rank waits for a
    step.
    """
    thread.join(LIMIT_SECONDS)
    assert outcome, "it still waits"
    return outcome[0]


@pytest.mark.slow
@pytest.mark.parametrize("kill", [ray_kill, sigkill])
def test_dead_feed_ends_the_wait(
    config: DataConfig,
    tmp_path: Path,
    kill: Callable[[Feed], None],
) -> None:
    unbroken = [seen(step) for step in local(config)]
    feed = Feed.open(
        config,
        cursor=None,
        cursor_path="",
        num_ranks=1,
        run_dir=str(tmp_path),
        loader=pipeline.LoaderStages(pack=partial(StuckPack, 3)),
    )
    iterator = StepIterator(feed.handle, 0, 0, 0, feed.info.num_steps)

    for step in range(3):
        next(iterator)
        if step < 2:
            feed.commit(step)

    thread, outcome = in_thread(lambda: next(iterator))
    time.sleep(0.5)
    assert not outcome, "there is no step 3 to be had"

    kill(feed)
    error = outcome_of(thread, outcome)
    assert isinstance(error, LostError), error
    assert "FeedActor" in str(error)

    with pytest.raises(LostError, match="FeedActor"):
        feed.commit(2)
    cursor = Cursor.from_json(feed.cursor().to_json(), "there")
    feed.close()

    with opened(config, str(tmp_path), cursor) as again:
        assert again.first_step == 2
        assert [seen_of(report, digest) for report, digest in follow(again, config)] == unbroken[2:]


@pytest.mark.slow
def test_dead_feed_ends_the_commit(config: DataConfig, tmp_path: Path) -> None:
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
        error = outcome_of(thread, outcome)

    assert isinstance(error, LostError), error
    assert "FeedActor" in str(error)
    assert feed.cursor().consumed_rows == config.order.batch_size, "the step was not entered"


# --- loaders


def test_an_exception_in_a_stage_ends_the_run(config: DataConfig, tmp_path: Path) -> None:
    """It is no loss: it would come again at the same row."""
    loader = pipeline.LoaderStages(pack=partial(RaisingPack, 4))
    taken = []
    with (
        opened(config, str(tmp_path), loader=loader) as feed,
        pytest.raises(RunError) as raised,
    ):
        taken.extend(follow(feed, config))

    text = str(raised.value)
    assert "failed in steps 0 to 5: IndexError: list index out of range, at " in text
    assert f"; step {len(taken)} was to come next, of 64 rows between row " in text
    assert "apply UDF" not in text, "nothing of Ray Data's own"
    assert "in __call__" in raised.value.remote_stack
    observed("exception in a stage of the stream", text, "the data stream failed", SINCE)


@pytest.mark.slow
def test_poisonous_row_ends_the_run(config: DataConfig, tmp_path: Path) -> None:
    unbroken = local(config)
    row_id = int(unbroken[8].micro_batches[0][0].row_ids[0])
    loader = pipeline.LoaderStages(pack=partial(PoisonedPack, str(tmp_path), row_id))
    config = replace(config, stream=StreamConfig(max_retries=2, target_block_bytes=1))
    taken: list[str] = []

    with (
        opened(config, str(tmp_path), loader=loader) as feed,
        pytest.raises(LostError) as raised,
    ):
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


def test_without_retries_the_first_death_counts(
    config: DataConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither Ray Data nor a raylet prints anything beside the error."""
    row_id = int(local(config)[0].micro_batches[0][0].row_ids[0])
    loader = pipeline.LoaderStages(pack=partial(PoisonedPack, str(tmp_path), row_id))
    config = replace(config, stream=StreamConfig(max_retries=0))
    with pytest.raises(LostError):
        list(pipeline.blocks(pipeline.build(build_manifest(config.sources), config, loader=loader)))
    assert len(list(tmp_path.glob("death-*"))) == 1
    assert "".join(capfd.readouterr()) == ""


def test_killed_loader_changes_neither_order_nor_counts(config: DataConfig, tmp_path: Path) -> None:
    """In the midst of a window: the steps that it gave are neither lost nor counted twice.

    Each loader has its encoder from the driver, also one that takes the place of another: none
    imports transformers or torch.
    """
    unbroken = [step.report for step in local(config)]
    shutil.rmtree(os.environ["MILES_CACHE"], ignore_errors=True)  # so that none has it from there
    loader = pipeline.LoaderStages(pack=partial(MortalPack, str(tmp_path), 8))
    manifest = build_manifest(config.sources)
    expected, ledger = (
        Ledger(manifest, str(tmp_path / name), RejectLimits(1.0))
        for name in ("expected.jsonl", "rejects.jsonl")
    )
    for report in unbroken:
        expected.commit(report.position.index, report.rows)

    reports = []
    for block in pipeline.iterate(pipeline.build(manifest, config, loader=loader)):
        for report in shards.reports(block):
            ledger.commit(report.position.index, report.rows)
            reports.append(report)

    assert (tmp_path / "killed-1").exists(), "no loader was killed"
    imported = {path.name: path.read_text() for path in tmp_path.glob("imported-*")}
    assert len(imported) >= 3, "two were killed, and one went on"
    assert not any(imported.values()), imported
    assert [r.content.fingerprint for r in reports] == [r.content.fingerprint for r in unbroken]
    assert [r.rows.rejects for r in reports] == [r.rows.rejects for r in unbroken]
    assert ledger.totals() == expected.totals()
    assert sum(counts["read"] for counts in ledger.totals().values()) == 2 * manifest.num_rows
    assert (tmp_path / "rejects.jsonl").read_text() == (tmp_path / "expected.jsonl").read_text()
    assert ledger.num_rejected == 2 * len(ledger.rejects) == 8
