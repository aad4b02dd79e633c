"""`miles train` as a user gives it, in processes of its own that can be killed; and what one run has in common with
another."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from miles.convert.hf_to_megatron import hf_to_megatron
from miles.demo.model import build_model
from tests.support.clusters import PROJECT, demo_settings, environment, processes

NUM_STEPS, SAVE_INTERVAL = 18, 4
LIMIT_SECONDS = 240.0
"""Far above what anything here takes."""


class Place:
    """The demo's rows and tokenizer, a small Qwen3 and the same converted, in a folder; runs beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = demo_settings(folder)
        self.sources: dict[str, str] = settings["sources"]
        build_model(Path(settings["encode"]["tokenizer"]), folder / "hf")
        hf_to_megatron(str(folder / "hf"), str(folder / "megatron"))

    def words(self, save: str | Path, **more: Any) -> list[str]:
        """A command line; `more` are flags, None leaves one out."""
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
            values = value if isinstance(value, list) else [value]
            if value is not None:
                words += [
                    f"--{name.replace('_', '-')}",
                    *([] if value is True else map(str, values)),
                ]
        return words

    @contextlib.contextmanager
    def command(
        self, save: str | Path, env: Mapping[str, str] | None = None, **more: Any
    ) -> Iterator[Command]:
        command = Command(
            self.words(save, **more), self.folder / f"out-{time.time_ns()}", env or {}
        )
        try:
            yield command
        finally:
            command.end()


class Command:
    """A process and its descendants."""

    def __init__(self, words: list[str], output: Path, env: Mapping[str, str]) -> None:
        self._output = output
        with output.open("w") as stream:
            self.process = subprocess.Popen(
                words,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=PROJECT,
                env={**environment(), "COLUMNS": "200", **env},
            )

    @property
    def printed(self) -> str:
        return self._output.read_text()

    def family(self, name: str) -> list[psutil.Process]:
        """Descendants whose command line begins so."""
        return processes(name, self.process.pid)

    def kill_one(self, name: str) -> None:
        """SIGKILL to a process of Ray's, the last of those that are called so; waits until there is one."""

        def found() -> list[psutil.Process]:  # what they have forked is called the same
            family = self.family(name)
            return [
                process for process in family if process.ppid() not in {one.pid for one in family}
            ]

        self.until(lambda: bool(found()))
        found()[-1].send_signal(signal.SIGKILL)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.01)

    def wait(self, expect: int) -> str:
        """What it printed, when it has ended."""
        assert self.process.wait(LIMIT_SECONDS) == expect, self.printed
        assert "Traceback" not in self.printed, self.printed
        return self.printed

    def end(self) -> None:
        family = self.family("")
        self.process.kill()
        self.process.wait()
        _, left = psutil.wait_procs(family, timeout=60)
        assert not left, "a run's processes end with it"


def lines(save: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """A run's records so far; half a line that is being written is left out."""
    if not (save / name).exists():
        return []
    whole = (save / name).read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def tracked(save: Path) -> int:
    """Steps that the newest complete checkpoint holds."""
    tracker = save / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def numbers(save: Path) -> list[tuple[Any, ...]]:
    """What must be the same in every run over the same data, by step."""
    return [
        (
            line["step"],
            line["data/step_fingerprint"],
            line["sft/loss"],
            line["sft/grad_norm"],
            line["sft/tokens_seen"],
        )
        for line in lines(save)
    ]


def fingerprints(save: Path) -> list[tuple[int, str]]:
    return [(line["step"], line["data/step_fingerprint"]) for line in lines(save)]


def weights(export: Path) -> bytes:
    (file,) = export.glob("*.safetensors")
    return file.read_bytes()


def require_same(save: Path, other: Path) -> None:
    """Every step once, with the same numbers; the same weights, ledger and totals at the end: bit by bit."""
    assert numbers(save) == numbers(other)
    assert [line["step"] for line in lines(save)] == list(range(NUM_STEPS))
    assert weights(save / "export") == weights(other / "export")
    assert json.loads((save / "ledger.json").read_text()) == json.loads(
        (other / "ledger.json").read_text()
    )


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A filesystem of its own, of so many bytes or files (options of tmpfs)."""
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def slow_disk(folder: Path, seconds: float) -> dict[str, str]:
    """Environment in which every process's `fsync` takes its time, as on a slow disk."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        f"import os, time\nfsync = os.fsync\nos.fsync = lambda file: (time.sleep({seconds}), fsync(file))[1]\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(PROJECT)])}
