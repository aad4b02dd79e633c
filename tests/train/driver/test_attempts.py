"""The log of a run's attempts, and what follows one that failed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from miles.common import run_folder
from miles.common.checkpoint_folder import SavedCheckpoint
from miles.common.remote_errors import ray_errors
from miles.data.config import DataConfig, EncodeConfig, OrderConfig, SourceConfig
from miles.errors import (
    CheckpointError,
    ClusterError,
    DataError,
    LostError,
    NoRoomError,
    RunError,
    SourceError,
)
from miles.train.config import TrainConfig
from miles.train.driver.attempts import AttemptLog, with_restarts
from miles.train.driver.run_log import RunLog
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.types import StartPoint


def entries(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / run_folder.ATTEMPTS).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_start_has_its_reason(tmp_path: Path) -> None:
    url = str(tmp_path)
    first = AttemptLog(url)
    bf16 = Precision.BF16
    assert first.begin(0, "s3://key:secret@bucket/release", Layout(2), bf16) == "new run"

    first.end("ClusterError: a trainer died", 7)
    first.mark_restart()
    reason = first.begin(4, "there/iter_0000004", Layout(2), bf16)
    assert reason == "restarted after ClusterError: a trainer died"

    reason = AttemptLog(url).begin(4, "there", Layout(4, tensor=2), Precision.FP32)
    assert reason == "the same command again; start 2 has no end: it was killed"

    AttemptLog(url).end("SIGTERM", 9)
    reason = AttemptLog(url).begin(9, "there", Layout(1), bf16)
    assert reason == "the same command again, after SIGTERM"

    found = entries(tmp_path)
    assert [entry.get("start") for entry in found] == [1, None, 2, 3, None, 4]
    assert found[1] == {
        "end": 1,
        "time": found[1]["time"],
        "how": "ClusterError: a trainer died",
        "next_step": 7,
        "restarts": True,
    }
    assert (found[3]["tensor"], found[3]["data"]) == (2, 2)
    assert (found[2]["precision"], found[3]["precision"]) == ("bfloat16", "float32")
    assert "secret" not in (tmp_path / run_folder.ATTEMPTS).read_text()


def test_the_entries_begin_with_number_and_time(tmp_path: Path) -> None:
    log = AttemptLog(str(tmp_path))
    log.begin(0, "there", Layout(2), Precision.BF16)
    log.end("SIGTERM", 9)
    begin, end = entries(tmp_path)
    sizes = ["world_size", "tensor", "pipeline", "data", "expert"]
    assert list(begin) == [
        *("start", "time", "reason", "first_step", "checkpoint", *sizes, "precision", "miles"),
        "first_checkpoint",
    ]
    assert list(end) == ["end", "time", "how", "next_step"]


def test_an_end_is_entered_once(tmp_path: Path) -> None:
    """A finished run is asked again and again."""
    log = AttemptLog(str(tmp_path))
    log.begin(0, "there", Layout(1), Precision.BF16)
    log.end("SIGTERM", 9)
    log.end("the last step", 9)
    AttemptLog(str(tmp_path)).end("the last step", 9)
    assert [entry.get("how") for entry in entries(tmp_path)] == [None, "SIGTERM", "the last step"]


def test_first_checkpoint_of_a_start_is_noted(tmp_path: Path) -> None:
    log = AttemptLog(str(tmp_path))
    log.note_checkpoint(1)  # a run that was stopped before its first start
    for first, later in ((4, 8), (12, 16)):
        log.begin(first - 4, "there", Layout(1), Precision.BF16)
        log.note_checkpoint(first)
        log.note_checkpoint(later)
        log.end("SIGTERM", later)
    assert [entry.get("first_checkpoint") for entry in entries(tmp_path)] == [4, None, 12, None]


def test_a_run_that_begins_in_another_folder(tmp_path: Path) -> None:
    reason = AttemptLog(str(tmp_path)).begin(40, "there", Layout(1), Precision.BF16)
    assert reason == "continues a checkpoint of another folder"


class Bench:
    """A run whose attempts are functions of the test; `newest` is its newest checkpoint."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, max_restarts: int) -> None:
        data = DataConfig(
            (SourceConfig("chat", ("chat.jsonl",)),), OrderConfig(), EncodeConfig("hf")
        )
        self.config = TrainConfig("hf", "megatron", str(folder), data, max_restarts=max_restarts)
        self.newest = 0
        self.began_at: list[int] = []
        self.screen = io.StringIO()
        self.run_log = RunLog(str(folder), Console(file=self.screen, width=200))
        self.attempt_log = AttemptLog(str(folder))
        monkeypatch.setattr(StartPoint, "find", lambda config: self.start())

    def start(self) -> StartPoint:
        found = SavedCheckpoint(f"run/iter_{self.newest:07d}", self.newest, {})
        return StartPoint(found, is_resume=self.newest > 0)

    def run(self, attempt: Callable[[], str]) -> str:
        def logged(start: StartPoint) -> str:
            self.began_at.append(start.next_step)
            self.attempt_log.begin(start.next_step, start.url, Layout(1), Precision.BF16)
            try:
                return attempt()
            except Exception as error:
                self.attempt_log.end(str(error), start.next_step)
                raise

        return with_restarts(self.config, self.start(), self.run_log, self.attempt_log, logged)


def test_a_lost_part_is_restarted_from_the_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch, max_restarts=1)

    def attempt() -> str:
        bench.newest += 4
        if bench.newest < 12:
            raise LostError("a trainer\n   died")
        return "done"

    assert bench.run(attempt) == "done"
    assert bench.began_at == [0, 4, 8], "a new checkpoint begins the count of restarts anew"
    assert "  a trainer died\n  starting again from the last" in bench.screen.getvalue()
    assert "(restart 1 from it; --max-restarts 1)" in bench.screen.getvalue()
    reasons = [entry["reason"] for entry in entries(tmp_path) if "start" in entry]
    assert len(reasons) == 3
    assert all(reason.startswith("restarted after a trainer") for reason in reasons[1:])


def test_restarts_from_one_checkpoint_are_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch, max_restarts=2)

    def attempt() -> str:
        raise LostError("a trainer died")

    with pytest.raises(LostError, match="a trainer died") as raised:
        bench.run(attempt)
    assert bench.began_at == [0, 0, 0]
    assert "No restart is left (--max-restarts 2 from one checkpoint)" in str(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        NoRoomError("no GPU"),
        ClusterError("Ray has 1 CPU"),
        CheckpointError("another model"),
        RunError("trainer 1 failed: IndexError"),
        IndexError("of the driver"),
    ],
)
def test_what_a_restart_would_not_mend_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    bench = Bench(tmp_path, monkeypatch, max_restarts=3)

    def attempt() -> str:
        raise error

    with pytest.raises(type(error)):
        bench.run(attempt)
    assert bench.began_at == [0]


class Unbegun:
    """Attempts with these outcomes, none of which is entered as a start."""

    def __init__(self, *outcomes: Exception | str) -> None:
        self.outcomes = iter(outcomes)

    def __call__(self, start: StartPoint) -> str:
        outcome = next(self.outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def restarted(bench: Bench, attempt: Callable[[StartPoint], str]) -> str:
    return with_restarts(bench.config, bench.start(), bench.run_log, bench.attempt_log, attempt)


def test_an_attempt_lost_before_it_began_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch, max_restarts=1)
    assert restarted(bench, Unbegun(LostError("the feed died"), "done")) == "done"

    (entry,) = entries(tmp_path)
    assert entry == {
        "not_begun": "LostError: the feed died",
        "time": entry["time"],
        "next_step": 0,
        "restarts": True,
    }
    reason = bench.attempt_log.begin(0, "there", Layout(1), Precision.BF16)
    assert reason == "restarted after LostError: the feed died"


def test_a_first_failure_is_what_the_user_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any attempt has begun, and after an earlier command that was stopped."""
    for number in range(2):
        bench = Bench(tmp_path, monkeypatch, max_restarts=3)
        with pytest.raises(SourceError, match="no such file"):
            restarted(bench, Unbegun(SourceError("rows.parquet: no such file")))
        assert len(entries(tmp_path)) == 1 + 3 * number
        assert entries(tmp_path)[-1]["not_begun"] == "SourceError: rows.parquet: no such file"

        reason = AttemptLog(str(tmp_path)).begin(0, "there", Layout(1), Precision.BF16)
        expected = (
            "new run",
            "the same command again, after SourceError: rows.parquet: no such file",
        )
        assert reason == expected[number]
        AttemptLog(str(tmp_path)).end("SIGTERM", 9)


def test_a_restart_is_never_noted_at_a_start_or_at_nothing(tmp_path: Path) -> None:
    log = AttemptLog(str(tmp_path))
    log.mark_restart()
    log.begin(0, "there", Layout(1), Precision.BF16)
    log.mark_restart()
    assert "restarts" not in entries(tmp_path)[0]


def test_a_failure_is_entered_once_and_where_it_hit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that fails after its beginning was entered, and before its first step."""
    bench = Bench(tmp_path, monkeypatch, max_restarts=0)

    def attempt(start: StartPoint) -> str:
        bench.attempt_log.begin(0, "there", Layout(1), Precision.BF16)
        raise LostError("a trainer died")

    with pytest.raises(LostError):
        restarted(bench, attempt)
    begin, end = entries(tmp_path)
    assert (begin["start"], end["end"], end["how"]) == (1, 1, "LostError: a trainer died")


def test_a_log_that_cannot_be_written_hides_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch, max_restarts=1)
    (tmp_path / run_folder.ATTEMPTS).mkdir()  # in the place of the file
    with pytest.raises(DataError, match="too many rows"):
        restarted(bench, Unbegun(DataError("too many rows")))
    assert restarted(bench, Unbegun(LostError("the feed died"), "done")) == "done"


def test_an_error_of_ray_in_the_driver_is_one_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch, max_restarts=0)
    with pytest.raises(LostError, match=r"Ray failed: Actor.*node is gone"):
        restarted(bench, Unbegun(ray_errors.ActorUnschedulableError("its node is gone")))


def test_the_traceback_of_another_process_is_in_the_run_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, monkeypatch, max_restarts=3)
    error = RunError("trainer 1 failed during 'train_step': IndexError: 9")
    error.remote_stack = 'File "trainer.py", line 7, in train_step\nIndexError: 9'

    with pytest.raises(RunError) as raised:
        restarted(bench, Unbegun(error))
    assert str(raised.value).endswith(f"Its traceback is in {tmp_path}/train.log")
    assert "trainer.py" not in bench.screen.getvalue()
    kept = (tmp_path / "train.log").read_text()
    assert all(line in kept for line in error.remote_stack.splitlines())
