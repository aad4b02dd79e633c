"""Random SIGKILLs of the processes of a run: a seed fixes what is killed, and after which step.

    kills = draw_kills(draw)             feed at the start, raylet after step 6, driver after step 11
    ordeal = Ordeal(workspace, save)
    ordeal.finish(kills)                 gives the same command again until the run is finished
    require_same_but_times(save, unbroken)

A kill waits until the run has trained a number of steps, and then until there is a process of its
kind. So a seed means the same on a fast machine and on a slow one, as far as that is possible.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.support.commands import Command, Workspace
from tests.support.processes import LIMIT_SECONDS
from tests.support.runs import NUM_STEPS, lines, tracked

MAX_COMMANDS = 12
"""How often a run may need its command before that counts as a failure."""
LOST = 4
"""The exit status of a run that has lost too much; its command continues it."""


@dataclass(frozen=True)
class Target:
    """A kind of process in the family of a driver."""

    name: str
    pattern: str = ""
    """regular expression of the beginning of its command line; "" for the driver itself"""
    is_forked: bool = False
    """its parent has the same command line"""

    def among(self, driver: psutil.Process) -> list[psutil.Process]:
        """Return the processes of this kind, in the order of their ids."""
        if not self.pattern:
            return [driver]
        family: dict[int, psutil.Process] = {}
        with contextlib.suppress(psutil.Error):
            for process in driver.children(recursive=True):
                if re.match(self.pattern, _command_line(process)):
                    family[process.pid] = process

        found = []
        for pid in sorted(family):
            with contextlib.suppress(psutil.Error):
                if (family[pid].ppid() in family) == self.is_forked:
                    found.append(family[pid])
        return found


def _command_line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


DRIVER = Target("driver")
PARTS = (
    Target("trainer", "ray::TrainerActor"),
    Target("writer", "ray::TrainerActor", is_forked=True),
    Target("feed", "ray::FeedActor"),
)
"""What a run has of its own, from its first step to its last."""
STARTING = (
    Target("loader", r"ray::MapBatches"),
    Target("idle worker", r"ray::IDLE"),
)
"""What is sure to be there only while a run starts."""
RAYS_OWN = (
    Target("raylet", r"\S+/raylet/raylet "),
    Target("GCS", r"\S+/gcs/gcs_server "),
    Target("dashboard", r"\S*python.* \S+/dashboard/dashboard\.py "),
    Target("dashboard agent", r"ray::DashboardAgent"),
    Target("runtime-env agent", r"ray::RuntimeEnvAgent"),
    Target("log monitor", r"\S*python.* \S+/log_monitor\.py "),
    Target("autoscaler monitor", r"\S*python.* \S+/autoscaler/_private/monitor\.py "),
    Target("actor of Ray Data", r"ray::_StatsActor|ray::_?AutoscalingCoordinator"),
)
"""The processes with which Ray runs. Its object store (plasma) is a part of the raylet."""
TARGETS = (DRIVER, *PARTS, *STARTING, *RAYS_OWN)


@dataclass(frozen=True)
class Kill:
    """A SIGKILL that is due."""

    target: Target
    num_steps: int
    """lines that metrics.jsonl has then, at least; 0: as soon as there is such a process"""
    pick: float
    """which of several processes: 0 the first, below 1 the last"""

    def __str__(self) -> str:
        when = f"after step {self.num_steps}" if self.num_steps else "at the start"
        return f"{self.target.name} {when}"

    def find(self, driver: psutil.Process) -> psutil.Process | None:
        """Return the process to kill; None while there is none."""
        found = self.target.among(driver)
        return found[int(self.pick * len(found))] if found else None


def draw_kills(draw: random.Random) -> list[Kill]:
    """Draw four kills: something at the start; then a part of the run, a process of Ray's and the
    driver, in any order.
    """
    moments = sorted(draw.randint(1, NUM_STEPS - 2) for _ in range(3))
    later = [draw.choice(PARTS), draw.choice(RAYS_OWN), DRIVER]
    draw.shuffle(later)
    kills = [Kill(draw.choice([*PARTS[::2], *STARTING, *RAYS_OWN]), 0, draw.random())]
    for target, moment in zip(later, moments, strict=True):
        kills.append(Kill(target, moment, draw.random()))
    return kills


@dataclass
class Ordeal:
    """A run that suffers kills.

    Args:
        flags: of the command, as in `Workspace.words`.
    """

    workspace: Workspace
    save: Path
    flags: dict[str, Any] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    """what was done and seen, for the message of a failure"""
    outputs: list[str] = field(default_factory=list)
    """what each command printed"""
    _safe: dict[int, int] = field(default_factory=dict)
    """number of starts at a kill -> steps of the newest complete checkpoint"""

    def finish(self, kills: Sequence[Kill]) -> None:
        """Give the same command until the run is finished; kill meanwhile."""
        pending = list(kills)
        orphans: list[psutil.Process] = []
        with contextlib.ExitStack() as commands:
            for number in range(1, MAX_COMMANDS + 1):
                self.events.append(f"command {number}, {tracked(self.save)} steps are safe")
                started = self.workspace.command(self.save, **self.flags)
                command = commands.enter_context(started)
                orphans += self._suffer(command, pending)
                if self._is_finished(command):
                    break
            else:
                raise AssertionError(f"not finished after {MAX_COMMANDS} commands\n{self}")

        assert not pending, f"nothing there to kill: {pending[0]}\n{self}"
        _, left = psutil.wait_procs(orphans, timeout=LIMIT_SECONDS)
        assert not left, f"processes of a killed run live on: {left}\n{self}"
        self._require_nothing_lost()

    def _require_nothing_lost(self) -> None:
        """Assert that no start trained again what was safe."""
        entries = lines(self.save, "starts.jsonl")
        for num_entries, num_safe in self._safe.items():
            for entry in entries[num_entries:]:
                assert entry.get("first_step", num_safe) >= num_safe, f"{entry}\n{self}"

    def _suffer(self, command: Command, pending: list[Kill]) -> list[psutil.Process]:
        """Wait for the end of a command, and kill what is due; return what a killed driver left."""
        driver = psutil.Process(command.process.pid)
        family: list[psutil.Process] = []

        while pending and command.process.poll() is None:
            kill = pending[0]
            if len(lines(self.save)) < kill.num_steps or (victim := kill.find(driver)) is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    command.process.wait(0.02)
                continue
            if kill.target is DRIVER:
                family = driver.children(recursive=True)
            num_safe = tracked(self.save)
            with contextlib.suppress(psutil.Error):
                victim.send_signal(signal.SIGKILL)
                self._safe[len(lines(self.save, "starts.jsonl"))] = num_safe
                seen = f"{len(lines(self.save))} steps seen, {num_safe} safe"
                self.events.append(f"killed {kill}: process {victim.pid}; {seen}")
                pending.pop(0)

        command.process.wait(LIMIT_SECONDS)
        return family

    def _is_finished(self, command: Command) -> bool:
        """Judge the end of a command; return whether the run is finished."""
        status, printed = command.process.returncode, command.printed
        self.outputs.append(printed)
        self.events.append(f"exit status {status}")
        assert "Traceback" not in printed, f"{self}\n{printed}"
        assert status in (0, LOST, -signal.SIGKILL), f"{self}\n{printed}"
        assert printed.count("miles: error:") == (status == LOST), f"{self}\n{printed}"
        return status == 0

    def __str__(self) -> str:
        return "\n".join(self.events)


def require_same_but_times(save: Path, unbroken: Path) -> None:
    """Assert that a run has the metrics and the rejects of another one, but for times."""
    for name in ("metrics.jsonl", "rejects.jsonl"):
        mine, theirs = ((run / name).read_text(encoding="utf-8") for run in (save, unbroken))
        assert records_without_times(mine) == records_without_times(theirs), name


def records_without_times(text: str) -> list[dict[str, Any]]:
    """Return the records of JSON lines, without what depends on how fast the machine is."""
    records = []
    for line in text.splitlines():
        record = json.loads(line)
        records.append({key: value for key, value in record.items() if not _is_timed(key)})
    return records


def _is_timed(key: str) -> bool:
    return key.startswith("perf/") or key.endswith("seconds") or "queue_depth" in key
