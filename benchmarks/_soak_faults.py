"""The faults of a soak. Each is drawn before its job begins, and strikes while a command runs."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from benchmarks._soak_storage import Weather
from tests.support.chaos import DRIVER, TARGETS, Target

WANDB = Target("W&B", r"\S*wandb-core|\S*python.* \S*wandb")
LONG_PAUSE_SECONDS = 75.0
"""Longer than the lease of a run's folder."""
_WAIT_SECONDS = 60.0
"""The time that a fault waits for a process of its kind."""


@dataclass(frozen=True)
class Scene:
    """The processes and servers that a fault can reach."""

    driver: psutil.Process
    weather: Weather
    disk: Path | None
    """a small disk that holds the run's folder"""


@dataclass(frozen=True)
class Gap:
    """The time between two faults, or between the beginning of a command and a fault."""

    seconds: float
    after_checkpoint: bool
    """the next checkpoint must be complete, too"""


class Fault(Protocol):
    """Something that goes wrong."""

    gap: Gap
    statuses: tuple[int, ...]
    """with which a command may end because of it"""

    @property
    def name(self) -> str:
        """Return the kind, for the table."""

    def strike(self, scene: Scene) -> bool:
        """Do it; return whether there was anything to strike."""


@dataclass(frozen=True)
class Kill:
    """SIGKILL to a process."""

    target: Target
    pick: float
    gap: Gap
    statuses = (4, -signal.SIGKILL)

    @property
    def name(self) -> str:
        return f"kill: {self.target.name}"

    def strike(self, scene: Scene) -> bool:
        victim = _victim(self.target, self.pick, scene.driver)
        if victim is None:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
        return True


@dataclass(frozen=True)
class Pause:
    """SIGSTOP to a process, and SIGCONT after some seconds."""

    target: Target
    pick: float
    gap: Gap
    seconds: float
    statuses = (4,)

    @property
    def name(self) -> str:
        return f"pause{' > 60 s' if self.seconds > 60 else ''}: {self.target.name}"

    def strike(self, scene: Scene) -> bool:
        victim = _victim(self.target, self.pick, scene.driver)
        if victim is None:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.suspend()
            time.sleep(self.seconds)
            victim.resume()
        return True


@dataclass(frozen=True)
class Storm:
    """A burst of failures of the object store."""

    gap: Gap
    seconds: float
    statuses = (3, 4, 5)
    name = "S3: storm"

    def strike(self, scene: Scene) -> bool:
        scene.weather.storm(self.seconds)
        return True


@dataclass(frozen=True)
class FullDisk:
    """A disk without any room, for some seconds."""

    gap: Gap
    seconds: float
    statuses = (5,)
    name = "disk: full"

    def strike(self, scene: Scene) -> bool:
        if scene.disk is None:
            return False
        ballast = scene.disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb") as stream:
            while shutil.disk_usage(scene.disk).free:
                stream.write(bytes(1 << 16))
                stream.flush()
        time.sleep(self.seconds)
        ballast.unlink()
        return True


def _victim(target: Target, pick: float, driver: psutil.Process) -> psutil.Process | None:
    """Wait a little for processes of a kind; return one of them."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < deadline and driver.is_running():
        with contextlib.suppress(psutil.Error):
            found = target.among(driver)
            if found:
                return found[int(pick * len(found))]
        time.sleep(0.05)
    return None


def draw_faults(
    draw: random.Random, number: int, *, on_s3: bool, on_small_disk: bool, with_wandb: bool
) -> list[Fault]:
    """Draw the faults of a job."""
    kinds = ["kill", "kill", "kill driver", "pause", "pause"]
    kinds += ["storm", "storm"] * on_s3 + ["full disk", "full disk"] * on_small_disk
    kinds += ["kill W&B"] * with_wandb
    return [_draw_fault(draw, draw.choice(kinds)) for _ in range(number)]


def _draw_fault(draw: random.Random, kind: str) -> Fault:
    gap = Gap(draw.choice([draw.uniform(0, 3), draw.uniform(3, 12)]), draw.random() < 0.6)
    pick = draw.random()
    target: Target = draw.choice(_without(TARGETS, DRIVER))
    seconds = draw.uniform(1, 20)

    if kind == "kill":
        return Kill(target, pick, gap)
    if kind == "kill driver":
        return Kill(DRIVER, pick, gap)
    if kind == "kill W&B":
        return Kill(WANDB, pick, gap)
    if kind == "storm":
        return Storm(gap, draw.choice([seconds, 45.0]))
    if kind == "full disk":
        return FullDisk(gap, seconds)

    if draw.random() < 0.15:
        return Pause(DRIVER, pick, gap, LONG_PAUSE_SECONDS)
    return Pause(draw.choice(TARGETS), pick, gap, seconds)


def _without(targets: Sequence[Target], left_out: Target) -> list[Target]:
    return [target for target in targets if target is not left_out]
