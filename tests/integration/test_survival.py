"""Faults that a run survives: what follows an injected fault is what would have followed."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from miles.common import run_folder
from miles.errors import CheckpointError, LeaseError, RunError, SourceError
from miles.train.config import TrainConfig
from miles.train.driver import group
from miles.train.driver.loop import train
from miles.train.driver.records import RECORDS
from miles.train.launch.arguments import parse
from miles.train.rank.actor import TrainerActor
from miles.train.types import StepResult
from tests.support.commands import Workspace
from tests.support.disks import StandingDisk
from tests.support.fault_table import NOTHING, SINCE, observed
from tests.support.processes import wait_until
from tests.support.runs import NUM_STEPS, SAVE_INTERVAL, fingerprints, lines, require_same, tracked

pytestmark = pytest.mark.slow
CAUSES = {"TrainerActor": "died during '", "FeedActor": "the data stream failed"}
"""What is killed -> what is said of it."""


def draw_moment(
    draw: random.Random, first: int = SAVE_INTERVAL + 1, last: int = NUM_STEPS - 3
) -> int:
    """Draw after how many steps something happens: after the first checkpoint was begun."""
    return draw.randint(first, last)


def break_records(folder: Path) -> None:
    """Break each file of a run that only tells of it, as a disk that lost a block does."""
    for name in (run_folder.RUN_LOG, *RECORDS):
        *written, unfinished = (
            (folder / name).read_bytes().split(b"\n") if (folder / name).exists() else [b""]
        )
        content = [*written[:1], b"\xff" + bytes(20), *written[1:], unfinished]
        (folder / name).write_bytes(b"\n".join(content))
    for name in (run_folder.CONFIG, run_folder.CERTIFICATE, run_folder.FIRST_BATCH):
        (folder / name).write_bytes(b'{"a')


def test_killed_run_goes_on(
    workspace: Workspace, unbroken: Path, tmp_path: Path, draw: random.Random
) -> None:
    """It begins from the Hugging Face folder, the unbroken run from the converted checkpoint."""
    save, moment = tmp_path / "run", draw_moment(draw)
    with workspace.command(save, save_hf=save / "export", ref_load=None) as command:
        command.until(lambda: len(lines(save)) >= moment and tracked(save) >= SAVE_INTERVAL)
        with pytest.raises(LeaseError, match=f"process {command.process.pid}, begun"):
            train(settings(workspace, save), quiet())  # a second one, which must harm nothing
        command.process.send_signal(signal.SIGKILL)
        command.process.wait()
    seen, kept = len(lines(save)), tracked(save)
    assert kept % SAVE_INTERVAL == 0
    assert seen - kept <= 2 * SAVE_INTERVAL, (
        "the one before the last is complete before the last is begun"
    )
    first_start = lines(save, "starts.jsonl")[0]
    assert first_start["checkpoint"] == str(workspace.folder / "hf")
    break_records(save)
    with workspace.command(save, save_hf=save / "export", ref_load=None) as command:
        printed = command.wait(0)
    start = (
        f"going on at step {kept} from {save}/iter_{kept:07d} "
        "(the same command again; start 1 has no end"
    )
    assert start in printed
    assert "\nmiles: starting Ray\n" in f"\n{printed}"
    assert "which load the weights of" in printed
    observed("driver killed (SIGKILL, out of memory, power)", printed, start, SINCE)
    assert printed.count(".broken\n") == len(RECORDS) + 1
    fault = "records of a run with lines that cannot be read, then the same command"
    observed(fault, printed, "starts.jsonl: line 2 cannot be read", "the line")
    require_same(save, unbroken)
    assert not list(save.glob(".saving-*"))
    assert [entry.get("start") for entry in lines(save, "starts.jsonl")] == [1, 2, None]

    screen = io.StringIO()
    train(settings(workspace, save, save_hf=save / "export"), Console(file=screen, width=400))
    finished = f"this run is finished: {NUM_STEPS} of {NUM_STEPS} steps are in "
    assert f"{finished}{save}/iter_{NUM_STEPS:07d}" in screen.getvalue()
    require_same(save, unbroken)
    observed("same command after the last step", screen.getvalue(), "this run is finished", NOTHING)
    assert [entry.get("start") for entry in lines(save, "starts.jsonl")] == [1, 2, None], (
        "a finished run does not start"
    )


def test_run_starts_again_what_it_lost(
    workspace: Workspace, unbroken: Path, tmp_path: Path, draw: random.Random
) -> None:
    """A loader is replaced without a restart; then a trainer dies, then the feed."""
    save = tmp_path / "run"
    with workspace.command(save, save_hf=save / "export") as command:
        command.kill_one("ray::MapBatches")
        command.until(lambda: len(lines(save)) >= 1)
        assert len(lines(save, "starts.jsonl")) == 1
        assert "starting again" not in command.printed
        observed("loader process killed", command.printed, "", NOTHING)
        for number, name in enumerate(CAUSES, 1):
            done = len(lines(save))
            moment = draw_moment(draw, done, max(done, min(done + 5, NUM_STEPS - 6)))
            command.until(lambda moment=moment: len(lines(save)) >= moment)
            command.kill_one(f"ray::{name}")
            command.until(lambda number=number: len(lines(save, "starts.jsonl")) == 1 + 2 * number)
            fault = "trainer killed" if number == 1 else "feed killed"
            observed(fault, command.printed.rpartition("starting again")[0], CAUSES[name], SINCE)
        printed = command.wait(0)

    require_same(save, unbroken)
    entries = lines(save, "starts.jsonl")
    assert [entry.get("start") for entry in entries] == [1, None, 2, None, 3, None]
    assert all(entry["reason"].startswith("restarted after LostError: ") for entry in entries[2::2])
    assert (
        "starting again from the last complete checkpoint (restart 1 from it; --max-restarts 3)"
        in printed
    )


def test_lost_trainer_ends_a_run_without_restarts(workspace: Workspace, tmp_path: Path) -> None:
    """Here also with a folder for temporary files whose path is too long for sockets."""
    save, long = tmp_path / "run", tmp_path / ("x" * 60)
    long.mkdir()
    with workspace.command(save, env={"TMPDIR": str(long)}, max_restarts=0) as command:
        command.until(lambda: len(lines(save)) >= 3)
        command.kill_one("ray::TrainerActor")
        printed = command.wait(4)
    assert printed.count("miles: error:") == 1
    assert re.search("error: trainer [01] died during '", printed), (
        "the one that was killed, not one that missed it"
    )
    observed("trainer killed, `--max-restarts` used up", printed, "miles: error:", SINCE)
    assert "too long a path for its sockets" in printed


def test_sigterm_saves_for_any_layout(workspace: Workspace, unbroken: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    layouts: list[dict[str, int]] = [
        {},
        {"tensor_model_parallel_size": 2},
        {},
        {"pipeline_model_parallel_size": 2},
    ]
    # A terminal sends Ctrl-C, and that it closes, to every process of the run.
    stops: list[tuple[str, Callable[[int], None]]] = [
        ("SIGTERM", lambda pid: os.kill(pid, signal.SIGTERM)),
        ("Ctrl-C", lambda pid: os.killpg(pid, signal.SIGINT)),
        ("SIGHUP", lambda pid: os.killpg(pid, signal.SIGHUP)),
    ]

    for layout, at, stop in zip(layouts, (4, 8, 12, NUM_STEPS), [*stops, None], strict=True):
        with workspace.command(save, is_read=stop is not None, **layout) as command:
            command.until(lambda at=at: len(lines(save)) >= at)
            if stop is not None:
                stop[1](command.process.pid)
            printed = command.wait(0)
        kept = tracked(save)
        assert kept == len(lines(save)), "nothing is lost"
        if stop is None or kept == NUM_STEPS:
            continue
        log = (save / "train.log").read_text()
        assert f"{stop[0]}: stopping after step {kept - 1}" in log
        if stop[0] != "SIGHUP":  # nobody reads what is printed after it
            assert f"stopped by {stop[0]}; the same command goes on at step {kept}" in printed
        if stop[0] == "SIGTERM":
            observed("SIGTERM to the driver", printed, "the same command goes on", NOTHING)
        if stop[0] == "SIGHUP":
            observed("terminal closed", log, "SIGHUP: stopping after", NOTHING)

    assert tracked(save) == NUM_STEPS
    assert "(nobody reads it any more); the command goes on" in printed
    assert fingerprints(save) == fingerprints(unbroken)

    for mine, theirs in zip(lines(save), lines(unbroken), strict=True):
        assert mine["sft/loss"] == pytest.approx(theirs["sft/loss"], rel=1e-4)
    starts = [entry for entry in lines(save, "starts.jsonl") if "start" in entry]
    assert [entry["reason"] for entry in starts] == [
        "new run",
        "the same command again, after SIGTERM",
        "the same command again, after Ctrl-C",
        "the same command again, after SIGHUP",
    ]
    assert [(entry["data"], entry["tensor"], entry["pipeline"]) for entry in starts] == [
        (2, 1, 1),
        (1, 2, 1),
        (2, 1, 1),
        (1, 1, 2),
    ]


def test_steps_go_on_beside_a_save(workspace: Workspace, tmp_path: Path) -> None:
    """On a disk that stands still, a half-written checkpoint stops no step and is never loaded."""
    save = tmp_path / "run"
    disk = StandingDisk(tmp_path / "disk")
    flags = {"save_interval": 20, "num_epoch": 20, "actor_num_gpus_per_node": 1}
    with workspace.command(save, env=disk.environment, **flags, num_rollout=None) as command:
        command.until(lambda: len(lines(save)) >= 20 + 8)
        assert tracked(save) == 0, "many steps fit into a save"
        disk.let_go(20)
        command.until(lambda: tracked(save) == 20)
        command.until(lambda: len(lines(save)) >= 40 + 4 and list(save.glob(".saving-*")))
        (half,) = save.glob(".saving-iter_0000040-*")
        assert tracked(save) == 20
        command.process.send_signal(signal.SIGKILL)
        command.process.wait()

    extra = json.loads((save / "iter_0000020/miles.json").read_text())
    assert extra["metrics_lines"] == 20
    assert extra["cursor"]["tokens_seen"] == lines(save)[19]["sft/tokens_seen"], (
        "of the moment when it was begun"
    )
    ledger_totals = extra["cursor"]["ledger_totals"].values()
    assert sum(counts["read"] for counts in ledger_totals) == 20 * 32
    assert half.exists()
    # An epoch has 21 steps.
    with workspace.command(save, **{**flags, "num_epoch": None}, num_rollout=23) as command:
        printed = command.wait(0)
    assert f"going on at step 20 from {save}/iter_0000020" in printed
    assert not half.exists()
    assert [line["step"] for line in lines(save)] == list(range(23))
    assert lines(save)[-1]["sft/epoch"] > 1
    observed("killed while a checkpoint is written", printed, "going on at step", SINCE)


# --- what is refused, and rows that cannot be read; in this process


def settings(workspace: Workspace, save: Path, **more: Any) -> TrainConfig:
    flags = {"actor_num_gpus_per_node": 1, "deterministic_mode": None, **more}
    return parse(workspace.words(save, **flags)[4:])


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.mark.parametrize(
    ("more", "marker", "fault"),
    [
        (
            {"rollout_seed": 9},
            "--rollout-seed: the checkpoint has 42, this run 9",
            "other data or order than the checkpoint's",
        ),
        ({}, "ffn_hidden_size is ", "other model than the checkpoint's"),
    ],
)
def test_checkpoint_of_another_run_is_refused(
    workspace: Workspace,
    unbroken: Path,
    tmp_path: Path,
    more: dict[str, Any],
    marker: str,
    fault: str,
) -> None:
    if not more:
        shutil.copytree(workspace.folder / "hf", tmp_path / "hf")
        file = tmp_path / "hf/config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "intermediate_size": 256}))
        more = {"hf_checkpoint": tmp_path / "hf"}
    config = settings(
        workspace, tmp_path / "run", load=unbroken, num_rollout=None, num_epoch=2, **more
    )

    with pytest.raises(CheckpointError) as raised:
        train(config, quiet())
    assert marker in str(raised.value)

    observed(fault, str(raised.value), marker, NOTHING)
    assert not (tmp_path / "run/metrics.jsonl").exists() or not lines(tmp_path / "run")


def test_signal_before_the_first_step(workspace: Workspace, tmp_path: Path) -> None:
    save, screen = tmp_path / "run", io.StringIO()

    def stop() -> None:
        wait_until(lambda: (save / "config.json").exists())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    summary = train(settings(workspace, save), Console(file=screen, width=200))
    assert (summary.num_steps, summary.is_finished, summary.next_step) == (0, False, 0)
    observed(
        "SIGTERM before the first step", screen.getvalue(), "SIGTERM: stopping before", NOTHING
    )
    assert not lines(save)


def test_load_of_a_finished_run_says_so(
    workspace: Workspace, unbroken: Path, tmp_path: Path
) -> None:
    screen = io.StringIO()
    summary = train(
        settings(workspace, tmp_path / "run", load=unbroken), Console(file=screen, width=400)
    )
    assert (summary.num_steps, summary.is_finished, summary.next_step) == (0, True, NUM_STEPS)
    assert (
        f"this run is finished: {NUM_STEPS} of {NUM_STEPS} steps are in {unbroken}"
        in screen.getvalue()
    )


class SlowActor(TrainerActor):
    """Takes so long that the loader stands, its few windows ahead."""

    def train_step(self) -> StepResult:
        time.sleep(0.2)
        return super().train_step()


def corrupt(file: Path) -> None:
    """Overwrite the middle of the ninth of ten row groups, as a disk does that forgets."""
    chunk = pq.ParquetFile(file).metadata.row_group(8).column(0)
    times = file.stat()
    with file.open("r+b") as stream:
        stream.seek(chunk.data_page_offset + chunk.total_compressed_size // 2)
        stream.write(b"\xff" * 64)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def grow(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"more")


@pytest.mark.parametrize(
    ("harm", "at_step", "marker", "fault"),
    [
        (corrupt, 1, "cannot be read", "row group corrupt"),
        (Path.unlink, 3, "rows.parquet", "file gone while the run reads it"),
        (
            grow,
            3,
            "changed since its rows were counted",
            "file changed since its rows were counted",
        ),
    ],
)
def test_unreadable_rows_end_the_run_by_name(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path], None],
    at_step: int,
    marker: str,
    fault: str,
) -> None:
    file, save = tmp_path / "rows.parquet", tmp_path / "run"
    messages = [
        [{"role": "user", "content": f"what is {n}"}, {"role": "assistant", "content": "x" * 40}]
        for n in range(640)
    ]
    pq.write_table(pa.table({"messages": messages}), file, row_group_size=64)
    monkeypatch.setattr(group, "TrainerActor", SlowActor)
    config = settings(
        workspace,
        save,
        prompt_data=["rows", file],
        rollout_shuffle=None,
        shuffle_window=32,
        prefetch_steps=1,
        save_interval=2,
    )
    threading.Thread(
        target=lambda: (wait_until(lambda: len(lines(save)) >= at_step), harm(file))
    ).start()
    with pytest.raises(SourceError, match=r"rows\.parquet") as raised:
        train(config, quiet())
    assert marker in str(raised.value)
    assert max(at_step, 5) <= len(lines(save)) < NUM_STEPS, "the steps before are trained"
    assert tracked(save) >= 2
    assert len(lines(save, "starts.jsonl")) == 2, "starting again would not mend it"

    observed(fault, str(raised.value), marker, SINCE)


class WrongActor(TrainerActor):
    """Has a mistake that shows at the sixth step: it asks for a source that is not there."""

    def train_step(self) -> StepResult:
        result = super().train_step()
        self.num_done = getattr(self, "num_done", 0) + 1
        if self.num_done == 6:
            assert result.source_losses[2]
        return result


def test_an_exception_in_a_trainer_ends_the_run_at_once(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, screen = tmp_path / "run", io.StringIO()
    monkeypatch.setattr(group, "TrainerActor", WrongActor)
    with pytest.raises(RunError) as raised:
        train(settings(workspace, save), Console(file=screen, width=400))

    text = str(raised.value)
    error = "trainer 0 failed during 'train_step': IndexError: tuple index out of range"
    assert text.startswith(f"{error}, at ")
    assert text.endswith(f"Its traceback is in {save}/train.log")
    assert "in train_step" in (save / "train.log").read_text()
    assert "starting again" not in screen.getvalue()

    begin, end = lines(save, "starts.jsonl")
    assert end["how"].startswith(f"RunError: {error}")
    assert (begin["start"], end["end"], end["next_step"]) == (1, 1, 5)
    assert (len(lines(save)), tracked(save)) == (5, 4)
    observed("exception in a trainer", text, "failed during", SINCE)
