"""What a run survives: each fault is injected, and what follows must be what would have followed."""

from __future__ import annotations

import random
import signal
import statistics
import time
from pathlib import Path

import pytest

from tests.integration.commands import (
    NUM_STEPS,
    SAVE_INTERVAL,
    Place,
    fingerprints,
    lines,
    place,
    require_same,
    slow_disk,
    tracked,
    unbroken,
)

pytestmark = pytest.mark.slow
__all__ = ["place", "unbroken"]


def a_moment(first: int = SAVE_INTERVAL + 1, last: int = NUM_STEPS - 3) -> int:
    """After how many steps something happens: another one each time, after the first checkpoint was begun."""
    return random.SystemRandom().randint(first, last)


def test_killed_the_same_command_goes_on_as_if_nothing_had_been(place: Place, unbroken: Path, tmp_path: Path) -> None:
    save, moment = tmp_path / "run", a_moment()
    with place.command(save, save_hf=save / "export") as command:
        command.until(lambda: len(lines(save)) >= moment)
        command.process.send_signal(signal.SIGKILL)
        command.process.wait()
    seen, kept = len(lines(save)), tracked(save)
    assert kept % SAVE_INTERVAL == 0
    assert seen - kept <= 2 * SAVE_INTERVAL, "the one before the last is complete before the last is begun"
    with place.command(save, save_hf=save / "export") as command:
        printed = command.wait(0)
    if kept:
        assert (
            f"going on at step {kept} from {save}/iter_{kept:07d} (the same command again; start 1 has no end"
            in printed
        )
    require_same(save, unbroken)
    assert not list(save.glob(".saving-*"))
    with place.command(save, save_hf=save / "export") as command:
        printed = command.wait(0)
    assert f"this run is finished: {NUM_STEPS} of {NUM_STEPS} steps are in {save}/iter_{NUM_STEPS:07d}" in printed
    require_same(save, unbroken)
    assert [entry.get("start") for entry in lines(save, "starts.jsonl")] == [1, 2, None], (
        "a finished run does not start"
    )


def test_what_is_lost_of_it_is_started_again_by_the_run_itself(place: Place, unbroken: Path, tmp_path: Path) -> None:
    """A loader, then a trainer, then the feed: of these the first is made good without a restart."""
    save = tmp_path / "run"
    with place.command(save, save_hf=save / "export") as command:
        command.kill_one("ray::MapBatches")
        command.until(lambda: len(lines(save)) >= 1)
        assert len(lines(save, "starts.jsonl")) == 1
        for number, name in enumerate(("ray::TrainerActor", "ray::FeedActor"), 1):
            moment = a_moment(len(lines(save)), min(len(lines(save)) + 5, NUM_STEPS - 2))
            command.until(lambda moment=moment: len(lines(save)) >= moment)
            command.kill_one(name)
            command.until(lambda number=number: len(lines(save, "starts.jsonl")) == 1 + 2 * number)
        printed = command.wait(0)
    require_same(save, unbroken)
    entries = lines(save, "starts.jsonl")
    assert [entry.get("start") for entry in entries] == [1, None, 2, None, 3, None]
    assert all(entry["reason"].startswith("restarted after ClusterError: ") for entry in entries[2::2])
    assert "starting again from the last complete checkpoint (restart 1 from it; --max-restarts 3)" in printed


def test_without_restarts_left_a_lost_trainer_ends_the_command(place: Place, tmp_path: Path) -> None:
    save = tmp_path / "run"
    with place.command(save, max_restarts=0) as command:
        command.until(lambda: len(lines(save)) >= 3)
        command.kill_one("ray::TrainerActor")
        printed = command.wait(1)
    assert printed.count("miles: error:") == 1
    assert "a trainer died during" in printed or "trainer 0 failed during" in printed


def test_sigterm_saves_and_other_layouts_go_on(place: Place, unbroken: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    layouts: list[dict[str, int]] = [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}]
    for layout, at in zip(layouts, (5, 10, NUM_STEPS), strict=True):
        with place.command(save, **layout) as command:
            command.until(lambda at=at: len(lines(save)) >= at)
            if at < NUM_STEPS:
                command.process.send_signal(signal.SIGTERM)
            printed = command.wait(0)
        kept = tracked(save)
        assert kept == len(lines(save)), "nothing is lost"
        if kept < NUM_STEPS:
            assert f"stopped by SIGTERM; the same command goes on at step {kept}" in printed
    assert tracked(save) == NUM_STEPS
    assert fingerprints(save) == fingerprints(unbroken)
    for mine, theirs in zip(lines(save), lines(unbroken), strict=True):
        assert mine["sft/loss"] == pytest.approx(theirs["sft/loss"], rel=1e-4)
    starts = [entry for entry in lines(save, "starts.jsonl") if "start" in entry]
    assert [entry["reason"] for entry in starts] == ["new run", *["the same command again, after SIGTERM"] * 2]
    assert [(entry["data"], entry["tensor"], entry["pipeline"]) for entry in starts] == [
        (2, 1, 1),
        (1, 2, 1),
        (1, 1, 2),
    ]


def test_on_a_slow_disk_the_steps_go_on_and_what_is_half_written_is_never_loaded(place: Place, tmp_path: Path) -> None:
    save = tmp_path / "run"
    env = slow_disk(tmp_path / "disk", 4.0)
    with place.command(save, env=env, save_interval=30, num_rollout=None, num_epoch=20) as command:
        command.until(lambda: len(lines(save)) >= 31)
        assert tracked(save) == 0
        command.until(lambda: tracked(save) == 30)
        during = [line["perf/step_seconds"] for line in lines(save)[31:]]
        command.until(lambda: len(lines(save)) >= 65)
        (half,) = save.glob(".saving-iter_0000060-*")
        assert tracked(save) == 30
        command.process.send_signal(signal.SIGKILL)
        command.process.wait()
    assert len(during) >= 8, "many steps fit into a save"
    before = [line["perf/step_seconds"] for line in lines(save)[5:30]]
    ratio = statistics.median(during) / statistics.median(before)
    assert ratio < 1.2, f"a step takes {ratio:.2f} times as long while a checkpoint is written"
    extra = lines(save / "iter_0000030", "miles.json") or __import__("json").loads(
        (save / "iter_0000030/miles.json").read_text()
    )
    assert extra["metrics_lines"] == 30
    assert extra["cursor"]["tokens_seen"] == lines(save)[29]["sft/tokens_seen"], "of the moment when it was begun"
    assert half.exists()
    with place.command(save, save_interval=30, num_rollout=33) as command:
        printed = command.wait(0)
    assert f"going on at step 30 from {save}/iter_0000030" in printed
    assert not half.exists()
    assert [line["step"] for line in lines(save)] == list(range(33))


def test_a_signal_before_the_first_step_ends_it_at_once(place: Place, tmp_path: Path) -> None:
    save = tmp_path / "run"
    with place.command(save) as command:
        command.until(lambda: (save / "certificate.json").exists())
        command.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        printed = command.wait(0)
    assert "SIGTERM: stopping before the first step" in printed
    assert time.monotonic() - begun < 60
    assert not lines(save)
