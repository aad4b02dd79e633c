"""The driver's side of saving, over trainers that only pretend to write."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from miles.common import storage, write_guard
from miles.common.checkpoint_tracker import TRACKER
from miles.data.config import DataConfig, EncodeConfig, OrderConfig, SourceConfig
from miles.errors import LeaseError, LostError, WriteError
from miles.train.config import ClusterConfig, TrainConfig
from miles.train.driver.checkpoint_manager import CheckpointManager
from miles.train.driver.group import TrainerGroup
from miles.train.driver.run_log import RunLog
from miles.train.types import SaveFailure, SaveStage

FULL = SaveFailure("no space left on device", "Make room there")


class PretendedGroup:
    """Two ranks whose stages and failures the test sets."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.stages = [SaveStage.WRITING, SaveStage.WRITING]
        self.failures: dict[str, SaveFailure] = {}

    def begin_save(self, url: str, iteration: int, extra: dict[str, Any]) -> SaveFailure | None:
        return self.answer("begin_save")

    def save_stages(self) -> list[SaveStage]:
        return self.stages

    def seal_save(self) -> SaveFailure | None:
        return self.answer("seal_save")

    def finish_uploads(self) -> SaveFailure | None:
        return self.answer("finish_uploads")

    def answer(self, name: str) -> SaveFailure | None:
        self.calls.append(name)
        return self.failures.get(name)


class Bench:
    """A manager over a pretended group."""

    def __init__(self, folder: Path, save: str, **settings: Any) -> None:
        data = DataConfig(
            (SourceConfig("chat", ("chat.jsonl",)),), OrderConfig(), EncodeConfig("hf")
        )
        config = TrainConfig("hf", "megatron", save, data, output_dir=str(folder), **settings)

        self.screen = io.StringIO()
        self.group = PretendedGroup()
        self.complete: list[int] = []
        self.manager = CheckpointManager(
            config,
            cast(TrainerGroup, self.group),
            RunLog(str(folder), Console(file=self.screen, width=300)),
            "megatron/release",
            self.complete.append,
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, str(tmp_path))


def test_a_checkpoint_is_named_when_all_ranks_have_written(bench: Bench, tmp_path: Path) -> None:
    bench.manager.begin(4, {}, must_succeed=False)
    bench.manager.poll()
    bench.group.stages = [SaveStage.WRITTEN, SaveStage.WRITING]
    bench.manager.poll()
    assert bench.group.calls == ["begin_save"]
    assert bench.complete == []
    assert not (tmp_path / TRACKER).exists()

    bench.group.stages = [SaveStage.WRITTEN, SaveStage.WRITTEN]
    bench.manager.poll()
    assert bench.complete == [4]
    assert (tmp_path / TRACKER).read_text() == "4"
    assert bench.manager.newest == f"{tmp_path}/iter_0000004"
    assert f"checkpoint  {tmp_path}/iter_0000004" in bench.screen.getvalue()

    bench.manager.poll()
    assert bench.group.calls == ["begin_save", "seal_save"], "nothing is pending any more"


def test_a_remote_checkpoint_is_uploaded_first(tmp_path: Path) -> None:
    bench = Bench(tmp_path, f"memory://{tmp_path.name}/run")
    bench.manager.begin(4, {}, must_succeed=False)
    bench.group.stages = [SaveStage.WRITTEN, SaveStage.WRITTEN]
    bench.manager.poll()
    bench.group.stages = [SaveStage.UPLOADED, SaveStage.UPLOADING]
    bench.manager.poll()
    assert bench.complete == []

    bench.group.stages = [SaveStage.UPLOADED, SaveStage.UPLOADED]
    bench.manager.poll()
    assert bench.complete == [4]
    assert bench.group.calls == ["begin_save", "seal_save", "finish_uploads"]


@pytest.mark.parametrize("stage", ["begin_save", "seal_save", "finish_uploads"])
def test_a_failure_ends_the_run_or_is_left_out(tmp_path: Path, stage: str) -> None:
    for on_save_error, must_succeed in (("end", False), ("continue", True), ("continue", False)):
        bench = Bench(tmp_path, f"memory://{tmp_path.name}/run", on_save_error=on_save_error)
        bench.group.failures[stage] = FULL
        expected = (
            f"the checkpoint of step 4 could not be written to memory://{tmp_path.name}/run: no "
            "space left on device; the last complete one is megatron/release"
        )

        ends = on_save_error == "end" or must_succeed
        if ends:
            with pytest.raises(WriteError, match="Make room there, then give the same") as info:
                save(bench, must_succeed=must_succeed)
            assert str(info.value).startswith(expected)
        else:
            save(bench, must_succeed=must_succeed)
            assert f"{expected}; the run goes on" in bench.screen.getvalue()
        assert bench.complete == []
        assert bench.manager.newest == "megatron/release"


@pytest.mark.parametrize(
    ("reason", "what_to_do"),
    [
        ("Worker failure: [Errno 28] No space left: '/x'", "Make room there, then give the same"),
        ("[Errno 30] Read-only file system: '/x'", "Make it writable, then give the same"),
        ("[Errno 13] Permission denied: '/x'", "Give this user the right to it, then give the"),
        ("s3://b/x: cannot be written: no such bucket. Create it", "Give the same command again"),
        ("RuntimeError: unknown", "Give the same command again"),
    ],
)
def test_the_remedy_is_that_of_the_cause(bench: Bench, reason: str, what_to_do: str) -> None:
    bench.group.failures["begin_save"] = SaveFailure(reason)
    with pytest.raises(WriteError) as info:
        bench.manager.begin(4, {}, must_succeed=True)
    assert f"is megatron/release. {what_to_do}" in str(info.value)


def save(bench: Bench, *, must_succeed: bool) -> None:
    """Take a remote checkpoint through all its stages."""
    bench.manager.begin(4, {}, must_succeed=must_succeed)
    for stage in (SaveStage.WRITTEN, SaveStage.UPLOADED):
        bench.group.stages = [stage, stage]
        bench.manager.poll()


def test_the_next_checkpoint_waits_for_the_one_before(bench: Bench) -> None:
    bench.manager.begin(4, {}, must_succeed=False)
    bench.group.stages = [SaveStage.WRITTEN, SaveStage.WRITTEN]
    bench.manager.begin(8, {}, must_succeed=False)
    assert bench.complete == [4]
    assert bench.group.calls == ["begin_save", "seal_save", "begin_save"]
    bench.manager.wait()
    assert bench.complete == [4, 8]


def test_a_checkpoint_that_takes_too_long_is_lost(tmp_path: Path) -> None:
    bench = Bench(tmp_path, str(tmp_path), cluster=ClusterConfig(timeout_minutes=1e-6))
    bench.manager.begin(4, {}, must_succeed=False)
    with pytest.raises(LostError, match="the checkpoint of step 4 was not written within"):
        bench.manager.wait()


def test_folder_of_another_run_gets_no_checkpoint(bench: Bench, tmp_path: Path) -> None:
    """The ranks would give it its name, in place of the other run's."""

    def refuse() -> None:
        raise LeaseError("taken over")

    bench.manager.begin(4, {}, must_succeed=False)
    bench.group.stages = [SaveStage.WRITTEN, SaveStage.WRITTEN]
    with write_guard.guarding(storage.place_of(str(tmp_path)), refuse):
        with pytest.raises(LeaseError):
            bench.manager.poll()
        assert bench.group.calls == ["begin_save"]
    bench.manager.poll()
    with (
        write_guard.guarding(storage.place_of(str(tmp_path)), refuse),
        pytest.raises(LeaseError),
    ):
        bench.manager.begin(8, {}, must_succeed=False)
    assert bench.group.calls == ["begin_save", "seal_save"]
