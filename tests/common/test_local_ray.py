"""Starting Ray: what it cannot use is told before anything runs, and a signal ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from miles.common import local_ray
from miles.errors import ClusterError
from tests.support.fault_table import NOTHING, observed
from tests.support.processes import LIMIT_SECONDS, PROJECT, environment, processes, wait_until

pytestmark = pytest.mark.heavy


def refusal(object_store_bytes: int = 80 << 20) -> str:
    """Return why no Ray was started."""
    with pytest.raises(ClusterError) as raised:
        local_ray.start(1, object_store_bytes)
    assert "\n" not in str(raised.value)
    assert not processes("", None), "nothing was started"
    return str(raised.value)


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/none")
    text = refusal()
    assert "Ray could not be started: FileNotFoundError: " in text
    observed("Ray's folder cannot be written", text, "could not be started", NOTHING)


def test_a_start_that_takes_too_long_is_made_once_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The time that Ray gives itself cannot be shortened, so its words stand in for it."""
    num_starts = 0
    init = ray.init

    def slow_init(**options: Any) -> Any:
        nonlocal num_starts
        num_starts += 1
        if num_starts == 1 or options["num_cpus"] == 2:
            raise Exception("The current node timed out during startup. This could happen because")
        return init(**options)

    monkeypatch.setattr("ray.init", slow_init)
    local_ray.start(1, 80 << 20)
    assert ray.is_initialized()
    parts = {part for process in processes("", os.getpid()) for part in process.cmdline()}
    ray.shutdown()
    unused = ("monitor.py", "log_monitor.py", "dashboard.py")
    assert not [part for part in parts if part.endswith(unused)], "nobody asks them"
    assert any(part.endswith("raylet/raylet") for part in parts)
    assert "starting it once more" in capsys.readouterr().err

    num_starts = 0
    with pytest.raises(ClusterError, match=r"timed out during startup.*less busy"):
        local_ray.start(2, 80 << 20)
    assert num_starts == 3


def test_a_ctrl_c_that_ray_swallows_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def swallowing_init(**options: Any) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("ray.init", swallowing_init)
    with pytest.raises(KeyboardInterrupt, match="ended while Ray was starting"):
        local_ray.start(1, 80 << 20)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_object_store_without_room() -> None:
    text = refusal(10**15)
    assert "Ray's object store takes 1,000,000,000 MB: /dev/shm has " in text
    observed("no room for Ray's object store", text, "takes", NOTHING)


def test_a_long_path_gives_way_to_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 60)))
    assert str(local_ray._folder()) == "/tmp/ray"
    printed = capsys.readouterr().err
    observed("path of Ray's folder too long for its sockets", printed, "Ray's files are", NOTHING)

    monkeypatch.setenv("RAY_TMPDIR", "/tmp/short")
    assert str(local_ray._folder()) == "/tmp/short/ray"
    assert not capsys.readouterr().err


def test_a_home_that_takes_no_token_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    local_ray._lend_token()
    assert "RAY_AUTH_TOKEN" not in os.environ, "Ray keeps its own there"

    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the user")
    local_ray._lend_token()
    assert os.environ["RAY_AUTH_TOKEN"] == "of the user"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    local_ray._lend_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    monkeypatch.delenv("RAY_AUTH_TOKEN")


@pytest.mark.parametrize(
    ("number", "status", "fault"),
    [
        (signal.SIGTERM, 143, "SIGTERM while Ray starts"),
        (signal.SIGINT, 130, "Ctrl-C while Ray starts"),
    ],
)
def test_a_signal_ends_a_ray_that_starts(number: int, status: int, fault: str) -> None:
    words = [sys.executable, "-m", "tests.support.join_ray"]
    process = subprocess.Popen(
        words, env=environment(), cwd=PROJECT, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: len(processes("", process.pid)) > 1)
    started = processes("", process.pid)
    process.send_signal(number)
    _, printed = process.communicate(timeout=LIMIT_SECONDS)

    assert process.returncode == status, printed
    name = "SIGTERM" if number == signal.SIGTERM else "miles: Ctrl-C"
    assert printed == f"{name}: ended while Ray was starting; nothing was begun\n"
    _, left = psutil.wait_procs(started, timeout=LIMIT_SECONDS)
    assert not left
    observed(fault, printed, "nothing was begun", NOTHING)
