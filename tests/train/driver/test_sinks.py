"""All sinks have the same metrics: read back from what TensorBoard and Weights & Biases wrote."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from miles.common import run_folder, storage
from miles.common.secret import Secret
from miles.data.config import DataConfig, EncodeConfig, OrderConfig, SourceConfig
from miles.errors import ConfigError, WriteError
from miles.train.config import TrainConfig
from miles.train.driver import sink_process
from miles.train.driver.metrics import Metrics
from miles.train.driver.metrics_log import MetricsLog
from miles.train.driver.sinks import _wandb_id, open_sinks
from miles.train.logging_config import LoggingConfig
from tests.support.disks import small_disk
from tests.support.fault_table import NOTHING, observed
from tests.support.processes import wait_until
from tests.support.wandb_server import wandb_server


def line(step: int) -> Metrics:
    loss = math.nan if step == 3 else 2.0 / (step + 1)
    return {
        "step": step,
        "sft/loss": loss,
        "data/num_rows": 16 + step,
        "data/step_fingerprint": f"{step:016x}",
    }


def test_the_id_at_wandb_ends_no_run_that_has_begun(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=64k") as disk:
        run_dir = str(disk)
        first = _wandb_id(run_dir, None, is_new=True, must_write=True)
        assert _wandb_id(run_dir, None, is_new=False, must_write=True) == first
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free))
        assert _wandb_id(run_dir, None, is_new=False, must_write=True) == first
        assert _wandb_id(run_dir, "chosen", is_new=True, must_write=False) == "chosen"
        with pytest.raises(WriteError, match=r"wandb_id\.txt: cannot be written: no space left"):
            _wandb_id(run_dir, "chosen", is_new=True, must_write=True)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / run_folder.METRICS).read_text().splitlines()]


def log_steps(
    config: LoggingConfig, folder: Path, first: int, last: int, *, breaks: bool = False
) -> None:
    data = DataConfig((SourceConfig("chat", ("chat.jsonl",)),), OrderConfig(), EncodeConfig("hf"))
    settings = dataclasses.asdict(TrainConfig("hf", "megatron", "s3://key:secret@bucket/run", data))
    with MetricsLog(str(folder), first, open_sinks(config, str(folder), first, settings)) as log:
        for step in range(first, last):
            log.write(line(step))
        if breaks:
            raise RuntimeError("broken off")


def test_a_resumed_run_drops_what_comes_again(tmp_path: Path) -> None:
    log_steps(LoggingConfig(), tmp_path, 0, 5)
    log_steps(LoggingConfig(), tmp_path, 2, 6)
    assert [entry["step"] for entry in lines_of(tmp_path)] == list(range(6))
    assert lines_of(tmp_path)[3] == {**line(3), "sft/loss": None}


def test_a_remote_file_is_written_at_each_checkpoint() -> None:
    url = f"memory://{secrets.token_hex(4)}"

    def steps() -> list[int]:
        return [
            json.loads(text)["step"]
            for text in storage.read_text(storage.join(url, run_folder.METRICS)).splitlines()
        ]

    log = MetricsLog(url, 0, [])
    for step in range(3):
        log.write(line(step))
        assert steps() == []
    log.flush()
    assert steps() == [0, 1, 2]
    log.write(line(3))
    log.close()
    assert steps() == [0, 1, 2, 3]
    with MetricsLog(url, 2, []) as log:
        log.write(line(2))
    assert steps() == [0, 1, 2]


def test_no_step_comes_twice_where_a_broken_line_is_gone(tmp_path: Path) -> None:
    """A checkpoint counts the lines before it; the line that a disk lost was among them."""
    log_steps(LoggingConfig(), tmp_path, 0, 5)
    path = tmp_path / run_folder.METRICS
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], *lines[2:]]))
    with MetricsLog(str(tmp_path), 3, [], first_step=3) as log:
        log.write(line(3))
    assert [entry["step"] for entry in lines_of(tmp_path)] == [0, 2, 3]


def tensorboard_events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / run_folder.TENSORBOARD))
    events.Reload()
    return events


def tensorboard_steps(folder: Path) -> list[int]:
    return [event.step for event in tensorboard_events(folder).Scalars("data/num_rows")]


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    config = LoggingConfig(use_tensorboard=True)
    log_steps(config, tmp_path, 0, 8)  # a run that left no checkpoint, and begins anew
    log_steps(config, tmp_path, 0, 5)
    log_steps(config, tmp_path, 2, 6)
    events = tensorboard_events(tmp_path)
    assert set(events.Tags()["scalars"]) == {"sft/loss", "data/num_rows"}
    rows = [(event.step, event.value) for event in events.Scalars("data/num_rows")]
    assert rows == [(step, 16 + step) for step in range(6)]
    losses = {event.step: event.value for event in events.Scalars("sft/loss")}
    assert losses == pytest.approx({step: 2.0 / (step + 1) for step in range(6) if step != 3})


def log_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file in LevelDB's log format, which wandb begins with seven bytes.

    It has blocks of 32 KiB. Before each piece are a checksum (4 bytes), a length (2), and whether
    it is a complete record (1), or the first (2), a middle (3) or the last (4) part of one.
    """
    place = 7
    parts = b""
    while place + 7 <= len(data):
        left = -place % 32768
        if left < 7 and left:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts = (b"" if kind in (1, 2) else parts) + data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts


@dataclasses.dataclass
class OfflineRun:
    """The run that one start left on disk."""

    run_id: str = ""
    exit_code: int | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def offline_runs(folder: Path) -> list[OfflineRun]:
    """By the time at which they ended."""
    from wandb.proto import wandb_internal_pb2

    runs = []
    for path in sorted(
        folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns
    ):
        runs.append(run := OfflineRun())
        for data in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = {
                    "/".join(item.nested_key) or item.key: item.value_json
                    for item in record.history.item
                }
                run.history.append(
                    {
                        key: json.loads(value)
                        for key, value in items.items()
                        if not key.startswith("_")
                    }
                )
            if record.HasField("run"):
                run.run_id = record.run.run_id
                run.config |= {
                    item.key: json.loads(item.value_json) for item in record.run.config.update
                }
            if record.HasField("exit"):
                run.exit_code = record.exit.exit_code
    return runs


LOG = "from tests.train.driver.test_sinks import main; main()"


def main() -> None:
    folder, mode, first, last, breaks, _ = sys.argv[1:]
    config = LoggingConfig(use_wandb=True, wandb_mode=mode, wandb_project="miles-tests")
    log_steps(config, Path(folder), int(first), int(last), breaks=breaks == "breaks")


def log_in_a_process(
    folder: Path, mode: str, first: int, last: int, end: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Log steps in a process of its own, with a password on its command line.

    It has no login, no home, and no terminal to ask on.
    """
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("WANDB") and key != "NETRC"
    }

    return subprocess.run(
        [
            sys.executable,
            "-c",
            LOG,
            str(folder),
            mode,
            str(first),
            str(last),
            end,
            "s3://key:secret@bucket/export",
        ],
        cwd=Path(__file__).parents[3],
        env={**inherited, "HOME": str(folder / "home"), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_wandb_offline_has_the_same_history(tmp_path: Path) -> None:
    broken_off = log_in_a_process(tmp_path, "offline", 0, 5, "breaks")
    assert "RuntimeError: broken off" in broken_off.stderr
    went_on = log_in_a_process(tmp_path, "offline", 2, 6, "well")
    runs = offline_runs(tmp_path)
    assert [run.exit_code for run in runs] == [1, 0]
    assert {run.run_id for run in runs} == {(tmp_path / run_folder.WANDB_ID).read_text()}, (
        "it goes on in the same run"
    )
    first, second = runs
    assert [entry["step"] for entry in first.history] == [0, 1, 2, 3, 4]
    assert [entry["step"] for entry in second.history] == [2, 3, 4, 5]
    assert "sft/loss" not in runs[0].history[3]

    lines = lines_of(tmp_path)
    for entry in runs[0].history + runs[1].history:
        line = lines[entry["step"]]
        expected = {key: value for key, value in line.items() if value is not None}
        del expected["data/step_fingerprint"]
        assert entry == expected

    assert runs[1].config["save"] == "s3://…@bucket/run"
    assert runs[1].config["data"]["sources"][0]["paths"] == [os.path.abspath("chat.jsonl")]
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"secret" not in everything
    assert (went_on.stdout, went_on.stderr) == ("", ""), "the terminal is the progress line's"

    log_in_a_process(tmp_path, "offline", 0, 1, "well")
    assert offline_runs(tmp_path)[2].run_id != runs[0].run_id, "what begins anew is another run"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("", "--use-wandb needs a login: WANDB_API_KEY, or wandb login"),
        ("hunter2", "--use-wandb: WANDB_API_KEY invalid"),
        ("hunter2" * 6, "--use-wandb: Failed to authenticate with http://127.0.0.1:9: "),
    ],
)
def test_wandb_without_login_is_refused(tmp_path: Path, key: str, message: str) -> None:
    """It asks nothing, and says no key."""
    environment = {
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_HTTP_TIMEOUT": "2",
        "WANDB_API_KEY": key,
    }
    done = log_in_a_process(tmp_path, "online", 0, 1, "well", **environment)

    last = done.stderr.splitlines()[-1]
    assert message in last
    assert last.startswith("miles.errors.ConfigError")
    assert last.endswith(
        ". --wandb-mode offline needs neither login nor network; wandb sync sends it later"
    )
    assert "hunter2" not in done.stderr
    assert not re.search("^wandb: ", done.stderr, re.MULTILINE), "only the error"
    assert done.stdout == ""


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sink is given up, and tried again, after a moment."""
    # TensorBoard sorts its files by the second of their beginning.
    monkeypatch.setattr(sink_process, "RETRY_SECONDS", 1.1)
    monkeypatch.setattr(sink_process, "ANSWER_SECONDS", 5.0)


class FollowedRun:
    """A run whose steps are logged one by one, with what it said."""

    def __init__(self, config: LoggingConfig, folder: Path) -> None:
        self.said: list[str] = []
        self.sinks = open_sinks(config, str(folder), 0, {})
        self.log = MetricsLog(str(folder), 0, self.sinks, report=self.said.append)
        self.num_steps = 0

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.log.write(line(self.num_steps))
            self.num_steps += 1

    @property
    def num_left(self) -> int:
        """Return the number of steps that the only sink has not taken yet."""
        (sink,) = self.sinks
        assert isinstance(sink, sink_process.BackgroundSink)
        return sink.num_pending

    def until_said(self, text: str) -> None:
        """Log a step now and then until the run says something."""

        def is_said() -> bool:
            self.steps(1)
            time.sleep(0.05)
            return any(text in sentence for sentence in self.said)

        wait_until(is_said)

    def processes(self) -> list[psutil.Process]:
        """Return the process of the only sink, and those that it has started."""
        (sink,) = self.sinks
        assert isinstance(sink, sink_process.BackgroundSink)
        assert sink.pid is not None
        process = psutil.Process(sink.pid)
        return [process, *process.children(recursive=True)]


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.usefixtures("soon")
def test_wandb_may_die_in_the_middle_of_a_run(tmp_path: Path) -> None:
    run = FollowedRun(LoggingConfig(use_wandb=True, wandb_mode="offline"), tmp_path)
    run.steps(5)
    wait_until(lambda: run.num_left == 0)  # wandb has them, and has not written them yet
    (service,) = (one for one in run.processes() if one.name() == "wandb-core")
    service.kill()

    run.until_said("Weights & Biases works again")
    run.steps(3)
    run.log.close()
    failed, works = run.said
    observed("W&B's process dies", failed, "Weights & Biases failed", NOTHING)
    seen = [step["step"] for one in offline_runs(tmp_path) for step in one.history]
    assert set(seen) == set(range(run.num_steps))
    assert not failed.startswith(works)
    assert [entry["step"] for entry in lines_of(tmp_path)] == list(range(run.num_steps))


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_sink_that_does_not_answer_is_begun_anew(tmp_path: Path, number: int) -> None:
    run = FollowedRun(LoggingConfig(use_tensorboard=True), tmp_path)
    run.steps(3)
    run.processes()[0].send_signal(number)
    run.until_said("TensorBoard works again")
    run.log.close()
    assert len(run.said) == 2
    assert tensorboard_steps(tmp_path) == list(range(run.num_steps))


@pytest.mark.usefixtures("soon")
def test_tensorboard_waits_for_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=64k") as disk:
        run = FollowedRun(LoggingConfig(use_tensorboard=True), disk)
        run.steps(3)
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free))
        run.until_said("TensorBoard failed")
        ballast.unlink()
        run.until_said("TensorBoard works again")
        run.until_said("metrics.jsonl is written again")
        run.log.close()
        (failed,) = (text for text in run.said if "TensorBoard failed" in text)
        observed("TensorBoard's disk full", failed, "TensorBoard", NOTHING)
        assert tensorboard_steps(disk) == list(range(run.num_steps))
        assert [entry["step"] for entry in lines_of(disk)] == list(range(run.num_steps))


def test_a_wandb_server_that_is_gone_does_not_hold_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink_process, "CLOSE_SECONDS", 2.0)
    monkeypatch.setenv("HOME", str(tmp_path))
    key = Secret("0123456789abcdef" * 3)
    with wandb_server() as server:
        config = LoggingConfig(use_wandb=True, wandb_host=server.url, wandb_key=key)
        run = FollowedRun(config, tmp_path / "run")
        run.steps(2)
    started = time.monotonic()
    processes = run.processes()
    run.steps(2)
    run.log.close()
    assert time.monotonic() - started < 60
    observed("W&B's server gone", run.said[-1], "Weights & Biases", NOTHING)
    assert not any(is_alive(process) for process in processes)
    assert len(lines_of(tmp_path / "run")) == 4


def test_a_sink_that_is_lost_during_a_run_is_no_error_of_its_restart(tmp_path: Path) -> None:
    config = LoggingConfig(
        use_wandb=True, wandb_host="http://127.0.0.1:9", wandb_key=Secret("0123456789abcdef" * 3)
    )
    said: list[str] = []
    sinks = open_sinks(config, str(tmp_path), 3, {}, must_open=False)
    with MetricsLog(str(tmp_path), 0, sinks, report=said.append) as log:
        log.write(line(3))
    assert said[0].startswith("Weights & Biases failed (--use-wandb: Failed to authenticate")
    assert "lacks the last 1 step" in said[-1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LoggingConfig(use_tensorboard=True),
            "--use-tensorboard writes into the run folder: give a local",
        ),
        (
            LoggingConfig(use_wandb=True, wandb_mode="offline"),
            "--wandb-mode offline writes into the run folder",
        ),
    ],
)
def test_a_remote_folder_takes_no_appending_sink(config: LoggingConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_sinks(config, "memory://run", 0, {})


def test_a_file_is_no_folder_for_wandb(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.touch()
    config = LoggingConfig(use_wandb=True, wandb_mode="offline", wandb_dir=str(path))
    with pytest.raises(ConfigError, match=r"--wandb-dir \S+: no folder can be made"):
        open_sinks(config, str(tmp_path / "run"), 0, {})


def test_wandb_leaves_only_its_id_in_a_remote_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    url = f"memory://{secrets.token_hex(4)}"
    config = LoggingConfig(use_wandb=True, wandb_mode="disabled")
    with MetricsLog(url, 0, open_sinks(config, url, 0, {})) as log:
        log.write(line(0))
        assert len(list(tmp_path.glob("miles-wandb-*"))) == 1
        run_id = storage.read_text(storage.join(url, run_folder.WANDB_ID))
    assert not list(tmp_path.glob("miles-wandb-*"))
    with MetricsLog(url, 1, open_sinks(config, url, 1, {})):
        assert storage.read_text(storage.join(url, run_folder.WANDB_ID)) == run_id


@pytest.mark.parametrize(("name", "extra"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = LoggingConfig(use_tensorboard=extra == "tensorboard", use_wandb=extra == "wandb")
    with pytest.raises(ConfigError, match=rf"pip install miles\[{extra}\]"):
        open_sinks(config, str(tmp_path), 0, {})
