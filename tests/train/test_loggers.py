"""metrics.jsonl and the boards say the same: read back from what TensorBoard and Weights & Biases wrote."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miles.errors import ConfigError
from miles.train.config import LoggingConfig
from miles.train.loggers import FILE, WANDB_ID, MetricsLog, open_boards
from miles.train.metrics import Metrics


def line(step: int) -> Metrics:
    loss = math.nan if step == 3 else 2.0 / (step + 1)
    return {"step": step, "sft/loss": loss, "data/num_rows": 16 + step, "data/step_fingerprint": f"{step:016x}"}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / FILE).read_text().splitlines()]


def log_steps(config: LoggingConfig, folder: Path, first: int, last: int, num_lines: int) -> None:
    boards = open_boards(config, str(folder), first, {"save": "s3://key:secret@bucket/run", "lr": 1e-5})
    log = MetricsLog(str(folder), num_lines, boards)
    for step in range(first, last):
        log.write(line(step))
    log.close()


def test_a_run_that_goes_on_drops_what_comes_again(tmp_path: Path) -> None:
    log_steps(LoggingConfig(), tmp_path, 0, 5, 0)
    log_steps(LoggingConfig(), tmp_path, 2, 6, 2)
    assert [entry["step"] for entry in lines_of(tmp_path)] == list(range(6))
    assert lines_of(tmp_path)[3] == {**line(3), "sft/loss": None}


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LoggingConfig(use_tensorboard=True)
    log_steps(config, tmp_path, 0, 5, 0)
    log_steps(config, tmp_path, 2, 6, 2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"sft/loss", "data/num_rows"}
    rows = [(event.step, event.value) for event in events.Scalars("data/num_rows")]
    assert rows == [(step, 16 + step) for step in range(6)]
    losses = {event.step: event.value for event in events.Scalars("sft/loss")}
    assert losses == pytest.approx({step: 2.0 / (step + 1) for step in range(6) if step != 3})


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, behind wandb's seven bytes: blocks of 32 KiB; before each piece a
    checksum (4 bytes), a length (2), and whether it is a whole record (1), or a first, middle or last part."""
    place, parts = 7, b""
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


def offline_records(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any], set[str]]:
    """All of the history, the configuration and the run's ids that offline runs left in a folder."""
    from wandb.proto import wandb_internal_pb2

    history, config, ids = [], {}, set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                history.append({key: json.loads(value) for key, value in items.items() if not key.startswith("_")})
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return history, config, ids


LOG = "from tests.train.test_loggers import main; main()"


def main() -> None:
    folder, first, last, num_lines = sys.argv[1:]
    config = LoggingConfig(use_wandb=True, wandb_mode="offline", wandb_project="miles-tests")
    log_steps(config, Path(folder), int(first), int(last), int(num_lines))


def test_weights_and_biases_offline_has_the_same_history(tmp_path: Path) -> None:
    """In processes of their own, without a login, a home, or a terminal to ask on."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    printed = ""
    for words in (["0", "5", "0"], ["2", "6", "2"]):
        done = subprocess.run(
            [sys.executable, "-c", LOG, str(tmp_path), *words],
            cwd=Path(__file__).parents[2],
            env={**environment, "HOME": str(tmp_path / "home")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        printed += done.stdout + done.stderr
    history, config, ids = offline_records(tmp_path)
    assert ids == {(tmp_path / WANDB_ID).read_text()}, "the second start goes on in the same run"
    assert [entry["step"] for entry in history] == [0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert "sft/loss" not in history[3]
    for entry in history:
        expected = {key: value for key, value in lines_of(tmp_path)[entry["step"]].items() if value is not None}
        del expected["data/step_fingerprint"]
        assert entry == expected
    assert config["lr"] == 1e-5
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"secret" not in everything
    assert "secret" not in printed
    assert "wandb" not in printed, "the terminal is the progress line's"


def test_weights_and_biases_without_a_login_is_refused_and_asks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match="--use-wandb needs a login: WANDB_API_KEY"):
        open_boards(LoggingConfig(use_wandb=True), str(tmp_path), 0, {})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LoggingConfig(use_tensorboard=True),
            "--use-tensorboard writes into the run's folder: give a local",
        ),
        (LoggingConfig(use_wandb=True, wandb_mode="offline"), "--wandb-mode offline writes into the run's folder"),
    ],
)
def test_a_remote_folder_is_no_place_for_what_is_written_bit_by_bit(config: LoggingConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_boards(config, "memory://run", 0, {})


@pytest.mark.parametrize(("name", "extra"), [("torch.utils.tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = LoggingConfig(use_tensorboard=extra == "tensorboard", use_wandb=extra == "wandb")
    with pytest.raises(ConfigError, match=rf"pip install miles\[{extra}\]"):
        open_boards(config, str(tmp_path), 0, {})
