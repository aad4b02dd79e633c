"""Who waits for whom: the queue depth, what is said to limit a run, and where both can be seen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from miles.data.config import DataConfig, StreamConfig
from miles.data.encoding.encoder import Encoder
from miles.data.stream import feed as feed_module
from miles.data.stream import pipeline, stages
from miles.data.stream.bottleneck import Stall, Timing
from miles.data.types import STAGES
from tests.support.clusters import (
    config_of,
    demo_settings,
    feed_actor_with,
    follow,
    opened,
    run,
    with_layout,
)

BOUND = 4


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return demo_settings(tmp_path_factory.mktemp("queue"), batch_size=32)


@pytest.fixture(scope="module")
def config(settings: dict[str, Any]) -> DataConfig:
    return with_layout(config_of(settings), 1)


def timings(
    config: DataConfig, run_dir: Path, seconds_a_step: float, num_steps: int | None = None
) -> list[Timing]:
    """A run with a trainer that takes so long for each step."""
    measured, last = [], time.perf_counter()
    with opened(config, str(run_dir)) as feed:
        for report, _ in follow(feed, config, num_steps):
            time.sleep(seconds_a_step)
            now = time.perf_counter()
            measured.append(
                Timing(
                    report.timing.queue_depth,
                    report.timing.wait_seconds,
                    now - last,
                    report.timing.stage_seconds,
                )
            )
            last = now
    return measured


def test_with_a_slow_trainer_the_queue_is_full_and_nothing_is_waited_for(
    config: DataConfig, tmp_path: Path
) -> None:
    config = replace(config, stream=StreamConfig(prefetch_steps=BOUND))
    first, *later = timings(config, tmp_path, 0.1)
    assert first.queue_depth == 0, "nothing can be ready before the stream has begun"
    assert first.wait_seconds > 0
    assert [timing.wait_seconds for timing in later] == [0.0] * len(later)
    assert min(timing.queue_depth for timing in later) > 0
    assert [timing.queue_depth for timing in later[-BOUND - 3 :]] == [
        BOUND,
        BOUND,
        BOUND,
        *range(BOUND, 0, -1),
    ]
    assert max(timing.queue_depth for timing in later) == BOUND
    stall = Stall.over(later)
    assert stall.limiting == "trainer"
    assert "The loader keeps up" in str(stall)


class SlowRead(pipeline._Read):
    """Reads as ever, and makes one of the loader's stages slow for as long as the window is at work."""

    def __init__(self, stage: str, seconds: float, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.stage, self.seconds = stage, seconds

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        target, name = {
            "read": (stages, "read_rows"),
            "normalize": (stages, "normalize"),
            "encode": (Encoder, "encode_all"),
            "pack": (stages, "pack"),
        }[self.stage]
        original = getattr(target, name)

        def slowed(*arguments: Any) -> Any:
            time.sleep(self.seconds)
            return original(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, slowed)
            yield from super().__call__(table)


SECONDS_A_CALL = {"read": 0.1 * 12, "normalize": 0.1 / 32, "encode": 0.1, "pack": 0.1}
"""0.1 s a step of 32 rows: there are 12 steps in a window, which is read at once."""


class NotedRead(pipeline._Read):
    """Leaves a file for each window that is read."""

    def __init__(self, folder: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.folder = Path(folder)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        read_window = stages.read_window

        def noted(manifest: Any, plan: Any, ref: Any, start_row: int) -> Iterator[pa.Table]:
            (self.folder / str(ref.first_step)).touch()
            return read_window(manifest, plan, ref, start_row)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages, "read_window", noted)
            yield from super().__call__(table)


def test_with_a_trainer_that_stands_the_loader_stands_too(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of two steps and one loader: as far as two windows beyond the step in use, though memory has room."""
    config = replace(
        config, order=replace(config.order, window_rows=64), stream=StreamConfig(prefetch_steps=1)
    )
    folder = tmp_path / "windows"
    folder.mkdir()
    monkeypatch.setattr(
        feed_module, "FeedActor", feed_actor_with(_Read=partial(NotedRead, str(folder)))
    )

    def read() -> list[int]:
        return sorted(int(file.name) for file in folder.iterdir())

    with opened(config, str(tmp_path)) as feed:
        steps = follow(feed, config)
        for needed, loaded in ((0, 4), (1, 4), (2, 6), (3, 6), (4, 8)):
            next(steps)
            deadline = time.monotonic() + 20
            while read()[-1:] != [loaded] and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(0.5 if needed else 3)
            assert read() == list(range(0, loaded + 1, 2))
        assert sum(1 for _ in steps) == feed.info.num_steps - 5
    assert len(read()) == 2 * 11, "all windows of both epochs"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_with_a_slow_stage_the_queue_is_empty_and_that_stage_is_named(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    # Blocks of a step or two, so that a step is not ready long before it is needed.
    config = replace(config, stream=StreamConfig(target_block_bytes=1))
    slow = feed_actor_with(_Read=partial(SlowRead, stage, SECONDS_A_CALL[stage]))
    monkeypatch.setattr(feed_module, "FeedActor", slow)
    later = timings(config, tmp_path, 0.0, num_steps=24)[1:]
    for timing in later:
        assert (timing.queue_depth == 0) == (timing.wait_seconds > 0)
    stall = Stall.over(later)
    assert stall.waited_share > 0.8
    assert stall.num_waited >= 1
    assert stall.limiting == stage
    assert f"most of all its stage {stage} " in str(stall)


@pytest.mark.slow
def test_the_depth_is_a_gauge_that_prometheus_can_scrape_on_this_machine_alone(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    changed = {**settings, "pack": {"max_tokens_per_gpu": 512}, "stream": {"prefetch_steps": BOUND}}
    answer, _ = run("scraped", {"config": changed, "run_dir": str(tmp_path), "seconds_a_step": 0.2})
    assert max(answer["depths"]) == BOUND
    assert set(answer["values"]) <= set(answer["depths"])
    assert BOUND in answer["values"], "the page has what the queue held"
    assert len(set(answer["values"])) > 1, "and follows it"
