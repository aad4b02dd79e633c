"""`miles train` as a user types it, in processes that can be killed."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from miles.convert.hf_to_megatron import hf_to_megatron
from miles.demo.model import build_model
from tests.support.processes import (
    LIMIT_SECONDS,
    PROJECT,
    closed_pipe,
    environment,
    processes,
    unforked,
    wait_until,
)
from tests.support.runs import NUM_STEPS, SAVE_INTERVAL
from tests.support.streams import demo_settings


class Workspace:
    """A folder with the demo's rows, a small Qwen3 and the same converted; runs start from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = demo_settings(folder)
        self.sources: dict[str, str] = settings["sources"]
        build_model(Path(settings["encode"]["tokenizer"]), folder / "hf")
        hf_to_megatron(str(folder / "hf"), str(folder / "megatron"))

    def words(self, save: str | Path, **more: Any) -> list[str]:
        """Return a command line.

        Args:
            more: flags that are added or replaced; True for one without a value, None to leave it
            out.
        """
        flags: dict[str, Any] = {
            "hf_checkpoint": self.folder / "hf",
            "ref_load": self.folder / "megatron",
            "save": save,
            "save_interval": SAVE_INTERVAL,
            "prompt_data": [word for pair in self.sources.items() for word in pair],
            "max_bad_fraction": 0.05,
            "rollout_batch_size": 32,
            "rollout_shuffle": True,
            "num_rollout": NUM_STEPS,
            "max_tokens_per_gpu": 1024,
            "lr": 1e-3,
            "lr_decay_style": "constant",
            "actor_num_gpus_per_node": 2,
            "deterministic_mode": True,
            **more,
        }
        words = [sys.executable, "-m", "miles.cli", "train"]

        for name, value in flags.items():
            if value is None:
                continue
            words.append("--" + name.replace("_", "-"))
            if isinstance(value, list):
                words += map(str, value)
            elif value is not True:
                words.append(str(value))

        return words

    @contextlib.contextmanager
    def command(
        self,
        save: str | Path,
        env: Mapping[str, str] | None = None,
        *,
        is_read: bool = True,
        **more: Any,
    ) -> Iterator[Command]:
        """Start a run; at the end, kill what is left of it.

        Args:
            env: beside this process's environment.
            is_read: False: the standard output is a pipe whose reader has gone.
            more: flags, as in `words`.
        """
        output = self.folder / f"out-{time.time_ns()}"
        command = Command(self.words(save, **more), output, env or {}, is_read=is_read)
        try:
            yield command
        finally:
            command.end()


class Command:
    """A process and its descendants."""

    def __init__(
        self, words: list[str], output: Path, env: Mapping[str, str], *, is_read: bool = True
    ) -> None:
        self._output = output
        with output.open("w") as stream, closed_pipe() as pipe:
            self.process = subprocess.Popen(
                words,
                stdout=stream if is_read else pipe,
                stderr=stream,
                cwd=PROJECT,
                env={**environment(), "COLUMNS": "200", **env},
                process_group=0,
            )

    @property
    def printed(self) -> str:
        return self._output.read_text()

    def kill_one(self, name: str) -> None:
        """Wait for a descendant whose command line begins with a name, and kill the newest."""
        found: list[psutil.Process] = []

        def is_there() -> bool:
            found[:] = unforked(name, self.process.pid)
            return bool(found)

        self.until(is_there)
        found[-1].send_signal(signal.SIGKILL)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition; fail when the process ends before."""

        def is_met() -> bool:
            if condition():
                return True
            assert self.process.poll() is None, self.printed
            return False

        wait_until(is_met, lambda: self.printed)

    def wait(self, expect: int) -> str:
        """Wait for the end; return what was printed.

        Args:
            expect: the exit status.
        """
        assert self.process.wait(LIMIT_SECONDS) == expect, self.printed
        assert "Traceback" not in self.printed, self.printed
        return self.printed

    def end(self) -> None:
        """Kill the process; assert that its descendants end with it."""
        family = processes("", self.process.pid)
        self.process.kill()
        self.process.wait()
        _, left = psutil.wait_procs(family, timeout=LIMIT_SECONDS)
        assert not left, "a run's processes end with it"
