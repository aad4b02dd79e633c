"""Who waits for whom: the queue depth, what is named as the bottleneck, and where both are seen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from miles.data.config import DataConfig, StreamConfig
from miles.data.encoding.encoder import Encoder
from miles.data.stream import pipeline, row_outcomes, stages
from miles.data.stream.bottleneck import Bottleneck, Timing
from miles.data.types import STAGES, StepReport
from tests.support.processes import wait_until
from tests.support.scenarios import run
from tests.support.stand_ins import GatedRead, NotedRead
from tests.support.streams import config_of, demo_settings, follow, opened, with_layout

BOUND = 4


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return demo_settings(tmp_path_factory.mktemp("queue"), batch_size=32)


@pytest.fixture(scope="module")
def config(settings: dict[str, Any]) -> DataConfig:
    return with_layout(config_of(settings), 1)


class Stopwatch:
    """Measures steps as the progress line does: from one to the next."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def timing_of(self, report: StepReport) -> Timing:
        """Return the timing of the step that has just been taken."""
        now = time.perf_counter()
        step_seconds = now - self._last
        self._last = now
        timing = report.timing
        return Timing(timing.queue_depth, timing.wait_seconds, step_seconds, timing.stage_seconds)


def test_slow_trainer_finds_a_full_queue(config: DataConfig, tmp_path: Path) -> None:
    """Nothing is ready for the first step; from then on the stream is ahead, and nobody waits."""
    config = replace(with_layout(config, 2), stream=StreamConfig(prefetch_steps=BOUND))
    gate = tmp_path / "gate"
    loader = pipeline.LoaderStages(read=partial(GatedRead, str(gate)))

    measured = []
    stopwatch = Stopwatch()
    with opened(config, str(tmp_path), loader=loader) as feed:
        ray.get(feed.handle.begin.options(num_returns=1).remote(0))  # as a rank that has to wait
        gate.touch()
        for report, _ in follow(feed, config, is_slow=True):
            measured.append(stopwatch.timing_of(report))

    first, *later = measured
    assert first.queue_depth == 0, "nothing can be ready before the stream has begun"
    assert first.wait_seconds > 0
    assert [timing.wait_seconds for timing in later] == [0.0] * len(later)
    depths = [timing.queue_depth for timing in later]
    assert depths == [BOUND] * (len(later) - BOUND + 1) + list(range(BOUND - 1, 0, -1))
    stall = Bottleneck.over(later)
    assert stall.limiting == "trainer"
    assert "The loader keeps up" in str(stall)


def test_waiting_trainer_stops_the_loader(config: DataConfig, tmp_path: Path) -> None:
    """With windows of two steps, one loader goes two windows beyond the step in use."""
    config = replace(
        config, order=replace(config.order, window_rows=64), stream=StreamConfig(prefetch_steps=1)
    )
    folder = tmp_path / "windows"
    folder.mkdir()
    loader = pipeline.LoaderStages(read=partial(NotedRead, str(folder)))

    def windows_read() -> list[int]:
        return sorted(int(file.name) for file in folder.iterdir())

    with opened(config, str(tmp_path), loader=loader) as feed:
        steps = follow(feed, config)
        for needed, loaded in ((0, 4), (1, 4), (2, 6), (3, 6), (4, 8)):
            next(steps)
            wait_until(lambda loaded=loaded: loaded in windows_read(), windows_read)
            # A loader that does not stop would read on meanwhile.
            time.sleep(0.5 if needed else 3)
            assert windows_read() == list(range(0, loaded + 1, 2))
        assert sum(1 for _ in steps) == feed.info.num_steps - 5
    assert len(windows_read()) == 2 * 11, "all windows of both epochs"


SLOW_SECONDS = 1.0
"""What the slow stage of a window adds to each step, far above what all else takes."""

STEP_ROWS = 96


class SlowRead(pipeline.Read):
    """Reads as ever; makes one stage of the loader slow in some windows.

    Such a window is not begun before the trainer has the step before it, so that the trainer waits for
    all of the window.

    Args:
        slow_stages: by the first step of the window.
        folder: where the trainer leaves a file for each step that it has.
    """

    def __init__(self, slow_stages: dict[int, str], folder: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.slow_stages = slow_stages
        self.folder = Path(folder)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for number in range(table.num_rows):
            window = table.slice(number, 1)
            first_step = window["first_step"][0].as_py()
            stage = self.slow_stages.get(first_step)
            if stage is None:
                yield from super().__call__(window)
                continue
            wait_until((self.folder / str(first_step - 1)).exists)
            with pytest.MonkeyPatch.context() as patch:
                slow_down(patch, stage)
                yield from super().__call__(window)


def slow_down(patch: pytest.MonkeyPatch, stage: str) -> None:
    """Have a stage take `SLOW_SECONDS` more for each step."""
    target, name, calls_a_step = {
        "read": (stages, "read_raw_rows", 1 / 4),  # all steps of a window at once
        "normalize": (row_outcomes, "normalize_rows", 1 / 4),
        "encode": (Encoder, "encode_rows", 1 / 4),  # all steps of a table at once
        "pack": (stages, "pack", 1),
    }[stage]
    original = getattr(target, name)

    def slowed(*arguments: Any) -> Any:
        time.sleep(SLOW_SECONDS / calls_a_step)
        return original(*arguments)

    patch.setattr(target, name, slowed)


def test_slow_stage_is_named(config: DataConfig, tmp_path: Path) -> None:
    """After a first window, four of 3 or 4 steps; in each of them, another stage is slow."""
    order = replace(config.order, batch_size=STEP_ROWS, window_rows=384, num_epoch=3)
    # Blocks of one step, so that a step is not ready long before it is needed.
    config = replace(config, order=order, stream=StreamConfig(target_block_bytes=1, loader_cpus=1))
    slow_stages = {4: "encode", 7: "read", 11: "normalize", 14: "pack"}
    assert sorted(slow_stages.values()) == sorted(STAGES)
    taken = tmp_path / "taken"
    taken.mkdir()
    loader = pipeline.LoaderStages(read=partial(SlowRead, slow_stages, str(taken)))

    measured = []
    stopwatch = Stopwatch()
    with opened(config, str(tmp_path), loader=loader) as feed:
        for report, _ in follow(feed, config, num_steps=18):
            measured.append(stopwatch.timing_of(report))
            (taken / str(report.position.index)).touch()

    windows = (measured[4:7], measured[7:11], measured[11:14], measured[14:18])
    for stage, timings in zip(slow_stages.values(), windows, strict=True):
        for timing in timings:
            assert (timing.queue_depth == 0) == (timing.wait_seconds > 0)
        bottleneck = Bottleneck.over(timings)
        assert bottleneck.num_waited >= 1
        assert bottleneck.waited_share > 0.8
        assert bottleneck.limiting == stage
        assert f"most of all its stage {stage} " in str(bottleneck)


def test_queue_depth_is_a_gauge(settings: dict[str, Any], tmp_path: Path) -> None:
    """A page for Prometheus shows each depth that the queue had."""
    changed = {**settings, "pack": {"max_tokens_per_gpu": 512}, "stream": {"prefetch_steps": BOUND}}
    answer = run("scraped", {"settings": changed, "run_dir": str(tmp_path)})
    assert max(answer["depths"]) == BOUND
    assert answer["shown"][-BOUND:] == list(range(BOUND, 0, -1)), "the page follows the queue"
    assert set(answer["shown"]) == set(answer["depths"])
