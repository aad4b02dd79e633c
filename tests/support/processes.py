"""Processes that tests start, look for and kill."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO
from unittest.mock import patch

import psutil

PROJECT = Path(__file__).parents[2]

LIMIT_SECONDS = 240.0
"""How long a test waits for anything: far above what it takes, also on a busy machine."""

_MAX_PAUSE_SECONDS = 0.05
"""Between two looks: to look through all processes takes some milliseconds of a processor."""


def closed_pipe() -> TextIO:
    """Return a stream into a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def wait_until(condition: Callable[[], object], describe: Callable[[], object] = str) -> None:
    """Wait for a condition.

    Args:
        describe: what to say when the condition does not come true in `LIMIT_SECONDS`.
    """
    deadline = time.monotonic() + LIMIT_SECONDS
    pause = 0.01
    while not condition():
        assert time.monotonic() < deadline, describe()
        time.sleep(pause)
        pause = min(1.2 * pause, _MAX_PAUSE_SECONDS)


def processes(name: str, pid: int | None = None) -> list[psutil.Process]:
    """Return a process's descendants whose command line begins with a name.

    Args:
        name: such as "ray::MapBatches".
        pid: None: this process.
    """
    matching = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(name):
                    matching.append(process)
    return matching


def unforked(name: str, pid: int | None = None) -> list[psutil.Process]:
    """Return such descendants without what they have forked, which is called the same."""
    family = processes(name, pid)
    pids = {process.pid for process in family}
    with contextlib.suppress(psutil.Error):
        return [process for process in family if process.ppid() not in pids]
    return []


def environment() -> dict[str, str]:
    """Return this process's environment, without what would lead to a Ray that is running.

    Ray sets RAY_AUTH_MODE in a process that has started one; a user's shell does not have it.
    """
    left_out = ("RAY_ADDRESS", "RAY_AUTH_MODE")
    return {name: value for name, value in os.environ.items() if name not in left_out}


def free_port() -> int:
    """Return a port of localhost that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def miles(*words: str | Path, expect: int = 0) -> str:
    """Run a command line of Miles; return what it printed, both streams.

    Args:
        expect: the exit status.
    """
    done = subprocess.run(
        [sys.executable, "-m", "miles.cli", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=2 * LIMIT_SECONDS,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def miles_here(*words: str | Path, expect: int = 0) -> str:
    """Run a command line of Miles in this process, which has imported what it needs.

    Args:
        expect: the exit status.

    Returns:
        what it printed, both streams.
    """
    from miles.cli import main

    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        patch.dict(os.environ, {"COLUMNS": "200"}),
    ):
        status = main([str(word) for word in words])
    assert status == expect, printed.getvalue()
    return printed.getvalue()


def without_patience(printed: str) -> str:
    """Return what stands on an error stream but the lines of a wait, which a busy machine has."""
    lines = printed.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(_OF_A_WAIT))


_OF_A_WAIT = ("miles: looking at ", "miles: loading ", "miles: this takes a while")
