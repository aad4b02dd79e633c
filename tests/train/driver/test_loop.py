"""The order of events in a run's steps, over a feed and trainers that only pretend."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from miles.common import json_lines, lease, run_folder
from miles.common.checkpoint_files import iterations
from miles.common.checkpoint_folder import EXTRA, SavedCheckpoint
from miles.common.checkpoint_tracker import TRACKER, folder_name
from miles.convert import megatron_to_hf
from miles.data.config import DataConfig, EncodeConfig, OrderConfig, SourceConfig
from miles.data.types import (
    STAGES,
    Cursor,
    StepContent,
    StepPacking,
    StepPosition,
    StepReport,
    StepRows,
    StepTiming,
)
from miles.errors import LeaseError, LostError
from miles.train.config import EvalConfig, TrainConfig
from miles.train.driver.attempts import AttemptLog
from miles.train.driver.folder_leases import FolderLeases
from miles.train.driver.loop import TrainingLoop
from miles.train.driver.metrics import RunConstants
from miles.train.driver.metrics_log import MetricsLog
from miles.train.driver.preemption import Stopped, StopSignal
from miles.train.driver.resume_state import ResumeState
from miles.train.driver.run import Attempt, AttemptData, Run, RunSummary
from miles.train.driver.run_log import RunLog
from miles.train.driver.schedule import Schedule
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.types import SaveFailure, SaveStage, StartPoint, StepResult
from tests.support.disks import small_disk
from tests.support.fault_table import NOTHING, SINCE, observed
from tests.support.leases import PassingClock, elsewhere, takes_over
from tests.support.shapes import HAND_COUNTED

NUM_STEPS = 6


class PretendedRun:
    """Feed, trainers and evaluator in one: each notes what it was asked for."""

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        self.folder = folder
        self.events: list[str] = []
        self.first_step = self.next_step = first_step
        self.stop_signal = StopSignal()
        self.stop_after = self.fail_at = NUM_STEPS
        self.begun: tuple[int, dict[str, Any]] | None = None
        self.shape = HAND_COUNTED
        self.meanwhile: dict[int, Callable[[], object]] = {}
        """step -> what happens during it"""
        self.screen = io.StringIO()

    # --- the trainers

    def train_step(self) -> StepResult:
        self.events.append(f"train {self.next_step}")
        if self.next_step == self.fail_at:
            raise LostError("trainer 0 died")
        return StepResult((8.0 - self.next_step,), (1,), 1.0, 1e-3, 0.1)

    def begin_save(self, url: str, iteration: int, extra: dict[str, Any]) -> SaveFailure | None:
        self.events.append(f"save {iteration}")
        self.begun = iteration, extra
        return None

    def save_stages(self) -> list[SaveStage]:
        return [SaveStage.WRITTEN]

    def seal_save(self) -> SaveFailure | None:
        assert self.begun is not None
        iteration, extra = self.begun
        self.events.append(f"seal {iteration}")
        (self.folder / folder_name(iteration)).mkdir()
        (self.folder / folder_name(iteration) / EXTRA).write_text(json.dumps(extra))
        return None

    def nodes_without(self, url: str) -> list[str]:
        """Note that the ranks were to write an export; then the driver has to convert it."""
        self.events.append(f"export {Path(url).name}")
        return ["node-2"]

    # --- the feed

    def commit(self, step: int) -> StepReport:
        self.events.append(f"commit {step}")
        assert step == self.next_step
        self.meanwhile.get(step, lambda: None)()
        self.next_step += 1
        if self.next_step == self.stop_after:
            self.stop_signal.is_requested = True
        return StepReport(
            StepPosition(step, 0.0, 2 * self.next_step),
            StepRows((2,), (0,), (0,), ()),
            StepContent(2, 20, 100, 10, (10,), 0, "00ff"),
            StepPacking(1.0, 1.0),
            StepTiming(dict.fromkeys(STAGES, 0.1), queue_depth=3),
        )

    def cursor(self) -> Cursor:
        return Cursor(2 * self.next_step, 1, True, 4, 2, False, (), "aa", "bb", self.next_step)

    def source_epochs(self) -> tuple[float, ...]:
        return (0.5,)

    def locate(self, row: int) -> tuple[str, str, int]:
        return "chat", "rows.jsonl", row

    def ledger_summary(self) -> dict[str, Any]:
        counts = {"read": 9, "trained": 7, "unknown_role": 2}
        return {"chat": {"counts": counts, "keys_not_used": {"mood": 3}}}

    def flush(self) -> None: ...

    def finish(self) -> None:
        self.events.append("finish")

    # --- the evaluator

    def run(self, group: Any, num_done: int) -> dict[str, float]:
        self.events.append(f"evaluate {num_done}")
        return {"eval/loss": 10.0 - num_done}

    # ---

    def train(
        self, schedule: Schedule, state: ResumeState | None = None, **settings: Any
    ) -> RunSummary:
        """Train with these as the parts of an attempt."""
        data = DataConfig(
            (SourceConfig("chat", ("chat.jsonl",)),),
            OrderConfig(batch_size=2),
            EncodeConfig("hf"),
            held_out_fraction=0.1,
        )
        folder = str(self.folder)
        config = replace(
            TrainConfig("hf", "megatron", folder, data, evaluation=EvalConfig(interval=1)),
            **settings,
        )

        console = Console(file=self.screen, width=200)
        state = state or ResumeState(num_metrics_lines=self.first_step)
        pretended = cast(Any, self)
        with (
            RunLog(folder, console) as run_log,
            MetricsLog(
                config.run_dir,
                state.num_metrics_lines,
                unwritten=state.unwritten_metrics,
                report=run_log.report,
            ) as metrics_log,
        ):
            log = AttemptLog(folder)
            leases = FolderLeases(())
            log.begin(self.first_step, "megatron/release", Layout(1), Precision.FP32)
            run = Run(config, console, run_log, log, self.stop_signal, False, pretended, leases)
            attempt = Attempt(
                run,
                StartPoint(SavedCheckpoint("megatron/release", 0, None), is_resume=False),
                AttemptData(state, pretended, pretended, schedule),
                pretended,
                metrics_log,
                RunConstants(("chat",), HAND_COUNTED, 1, None),
            )
            return TrainingLoop(attempt).run()

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


def test_a_run_to_its_end(tmp_path: Path) -> None:
    run = PretendedRun(tmp_path)
    summary = run.train(Schedule(NUM_STEPS, save_interval=4, eval_interval=3))
    assert run.events == [
        *("train 0", "commit 0", "train 1", "commit 1", "train 2", "commit 2", "evaluate 3"),
        *("train 3", "commit 3", "save 4", "train 4", "commit 4", "seal 4"),
        *("train 5", "commit 5", "evaluate 6", "save 6", "seal 6", "finish"),
    ]
    checkpoint = f"{tmp_path}/iter_0000006"
    assert summary == RunSummary(NUM_STEPS, 8.0, 3.0, NUM_STEPS, checkpoint, NUM_STEPS, True)
    assert (tmp_path / TRACKER).read_text() == "6"
    assert run.lines(run_folder.ATTEMPTS)[-1]["how"] == "the last step"

    assert (tmp_path / run_folder.LEDGER).exists()
    log = (tmp_path / run_folder.RUN_LOG).read_text()
    assert "Z  dropped: 2 unknown_role\n" in log
    assert "Z      unknown_role: say what the role means with" in log
    assert "Z  keys not used: mood (3 rows)\n" in log

    metrics = run.lines(run_folder.METRICS)
    assert [line["step"] for line in metrics] == list(range(NUM_STEPS))
    assert [line.get("eval/loss") for line in metrics] == [None, None, 7.0, None, None, 4.0]


def test_a_checkpoint_keeps_the_state_of_its_moment(tmp_path: Path) -> None:
    run = PretendedRun(tmp_path)
    run.train(Schedule(NUM_STEPS, save_interval=4, eval_interval=3))
    for num_done, eval_loss in ((4, None), (6, 4.0)):
        extra = json.loads((tmp_path / folder_name(num_done) / EXTRA).read_text())
        assert extra["metrics_lines"] == num_done
        assert extra["cursor"]["consumed_rows"] == 2 * num_done
        assert extra["eval_loss"] == eval_loss


def test_a_stop_saves_after_the_step_under_way(tmp_path: Path) -> None:
    run = PretendedRun(tmp_path)
    run.stop_after = 3
    summary = run.train(Schedule(NUM_STEPS, save_interval=4, eval_interval=3))
    assert run.events[-4:] == ["train 2", "commit 2", "save 3", "seal 3"]
    assert (summary.num_steps, summary.next_step, summary.is_finished) == (3, 3, False)
    assert not (tmp_path / run_folder.LEDGER).exists()
    end = run.lines(run_folder.ATTEMPTS)[-1]
    assert (end["how"], end["next_step"]) == ("SIGTERM", 3)


def test_a_second_ctrl_c_says_what_is_lost(tmp_path: Path) -> None:
    run = PretendedRun(tmp_path)

    def press_twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    run.meanwhile[5] = press_twice
    with run.stop_signal, pytest.raises(KeyboardInterrupt) as raised:
        run.train(Schedule(NUM_STEPS, save_interval=4))
    text = str(raised.value)
    assert text.startswith(f"Ctrl-C: stopped at once; 1 step since {tmp_path}/iter_0000004 is")
    observed("Ctrl-C, and once more", text, "Ctrl-C", SINCE)
    assert run.lines(run_folder.ATTEMPTS)[-1]["how"] == text
    assert (tmp_path / run_folder.RUN_LOG).read_text().endswith(f"ended: {text}\n")
    assert "Ctrl-C: stopping after step 5" not in (tmp_path / run_folder.RUN_LOG).read_text()


def test_a_stop_before_the_first_step_trains_none(tmp_path: Path) -> None:
    run = PretendedRun(tmp_path)
    run.stop_signal.is_requested = True
    with pytest.raises(Stopped):
        run.train(Schedule(NUM_STEPS))
    assert run.events == []


def test_a_failure_is_entered_with_the_step_that_it_hit(tmp_path: Path) -> None:
    run = PretendedRun(tmp_path)
    run.fail_at = 3
    with pytest.raises(LostError):
        run.train(Schedule(NUM_STEPS))
    end = run.lines(run_folder.ATTEMPTS)[-1]
    assert (end["how"], end["next_step"]) == ("LostError: trainer 0 died", 3)
    assert [line["step"] for line in run.lines(run_folder.METRICS)] == [0, 1, 2]


class ReplacedRun(PretendedRun):
    """It is stopped for minutes in step 4, while checkpoint 4 is pending; another one begins."""

    clock = PassingClock()
    left: Mapping[str, bytes]

    def train_step(self) -> StepResult:
        if self.next_step == 4:
            self.clock.seconds += 60
            takes_over(str(self.folder), elsewhere())
            self.left = contents(self.folder)
        return super().train_step()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_replaced_run_leaves_everything_as_it_is(tmp_path: Path) -> None:
    run = ReplacedRun(tmp_path)
    with (
        lease.hold(str(tmp_path), "--save", "miles train", print, clock=run.clock),
        pytest.raises(LeaseError, match="the other run goes on"),
    ):
        run.train(Schedule(NUM_STEPS, save_interval=4), save_interval=4)
    assert run.events[-3:] == ["save 4", "train 4", "commit 4"], "no seal, and no export"
    assert contents(tmp_path) == run.left


def test_an_old_checkpoint_that_stays_ends_nothing(tmp_path: Path) -> None:
    """A disk is mounted in it, as a stale file of a network disk would be in use."""
    run = PretendedRun(tmp_path)
    left: list[int] = []
    with contextlib.ExitStack() as stack:

        def mount() -> None:
            stack.enter_context(small_disk(tmp_path / folder_name(1) / "disk", "size=64k"))

        run.meanwhile[2] = mount
        run.meanwhile[4] = lambda: left.extend(iterations(str(tmp_path)))
        run.meanwhile[5] = stack.close
        summary = run.train(Schedule(NUM_STEPS, save_interval=1), keep_last=1)
    assert summary.is_finished
    printed = run.screen.getvalue()
    observed("old checkpoint that cannot be removed", printed, "Old checkpoints stay", NOTHING)
    assert printed.count("cannot be removed") == 1
    assert left == [1, 3], "the others are removed"
    assert iterations(str(tmp_path)) == [NUM_STEPS], "and this one as soon as it can be"


def test_a_checkpoint_takes_along_the_metrics_that_the_disk_did_not(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=64k") as disk:
        run_dir = disk / "run"
        ballast = disk / "ballast"
        run = PretendedRun(tmp_path)
        run.meanwhile[0] = lambda: ballast.write_bytes(bytes(shutil.disk_usage(disk).free))
        run.stop_after = 4
        schedule = Schedule(NUM_STEPS, save_interval=4)
        run.train(schedule, output_dir=str(run_dir))
        printed = run.screen.getvalue()
        assert printed.count("cannot be written") == 1
        observed("disk of the metrics full", printed, "cannot be written", NOTHING)
        assert "it lacks its last" in printed
        extra = json.loads((tmp_path / folder_name(4) / EXTRA).read_text())
        assert extra["metrics_lines"] == 4
        assert len(extra["unwritten_metrics"]) == 4

        ballast.unlink()
        start = StartPoint(SavedCheckpoint("iter", 4, extra), is_resume=True)
        again = PretendedRun(tmp_path, first_step=4)
        again.train(schedule, ResumeState.of(start), output_dir=str(run_dir))
        metrics = json_lines.read(str(run_dir / run_folder.METRICS))
        assert [line["step"] for line in metrics] == list(range(NUM_STEPS))
        assert "unwritten_metrics" not in (tmp_path / folder_name(6) / EXTRA).read_text()


def test_old_checkpoints_are_removed(tmp_path: Path) -> None:
    run = PretendedRun(tmp_path)
    schedule = Schedule(NUM_STEPS, save_interval=1, eval_interval=1)
    run.train(schedule, save_interval=1, keep_last=2)
    kept = sorted(path.name for path in tmp_path.glob("iter_*"))
    assert kept == ["iter_0000005", "iter_0000006"]


def test_ranks_export_at_the_moment_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PretendedRun(tmp_path)

    def convert(load: str, hf_checkpoint: str, save: str, **more: Any) -> str:
        run.events.append(f"convert {Path(load).name}")
        return save

    monkeypatch.setattr(megatron_to_hf, "megatron_to_hf", convert)
    monkeypatch.setattr(megatron_to_hf, "require_replaceable", lambda *_, **__: None)
    run.train(Schedule(NUM_STEPS, save_interval=4), save_hf=str(tmp_path / "{rollout_id}"))
    saving = run.events[run.events.index("save 4") :]
    assert saving == [
        *("save 4", "export .4.converting", "train 4", "commit 4", "seal 4"),
        *("convert iter_0000004", "train 5", "commit 5", "evaluate 6"),
        *("save 6", "export .6.converting", "seal 6", "convert iter_0000006", "finish"),
    ]


def test_a_summary_without_steps_has_no_loss() -> None:
    summary = RunSummary.of([], tokens_seen=0, checkpoint="run", next_step=0, is_finished=False)
    assert math.isnan(summary.first_loss)
    assert math.isnan(summary.last_loss)
    assert summary.num_steps == 0
