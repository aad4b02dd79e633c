"""A job of a soak: one run that suffers its faults, until it is finished; then it is judged.

The same command is given again after each end. Then the run is compared with its twin, a run with
the same layout to which nothing happened.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks._soak_faults import Fault, Gap, Scene, draw_faults
from benchmarks._soak_storage import Store
from tests.support.chaos import LOST, records_without_times
from tests.support.commands import Command, Workspace
from tests.support.runs import weights

NUM_STEPS = 36
STUCK_SECONDS = 900.0
"""Without anything new printed, a command is stuck."""
MAX_COMMANDS = 20
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"actor_num_gpus_per_node": 2},
    {"actor_num_gpus_per_node": 1},
)
_BUSY = "Ray could not be started"
"""The words of a command on a machine that is too busy for Ray, which waits for 30 s."""
_DISK_BYTES = 192 << 20


@dataclass(frozen=True)
class Plan:
    """The layout of a job, and what it suffers."""

    number: int
    layout: int
    rows_on_s3: bool
    save_on_s3: bool
    on_small_disk: bool
    with_wandb: bool
    begins_read_only: bool
    faults: tuple[Fault, ...]

    @classmethod
    def draw(cls, seed: int, number: int, *, may_mount: bool) -> Plan:
        """Draw the job of a number; each has a draw of its own."""
        draw = random.Random(f"{seed} {number}")  # noqa: S311
        rows_on_s3 = draw.random() < 0.5
        save_on_s3 = draw.random() < 0.4
        on_small_disk = draw.random() < 0.4 and may_mount and not save_on_s3
        with_wandb = draw.random() < 0.3

        faults = draw_faults(
            draw,
            draw.randint(5, 9),
            on_s3=rows_on_s3 or save_on_s3,
            on_small_disk=on_small_disk,
            with_wandb=with_wandb,
        )

        return cls(
            number,
            draw.randrange(len(LAYOUTS)),
            rows_on_s3,
            save_on_s3,
            on_small_disk,
            with_wandb,
            on_small_disk and draw.random() < 0.5,
            tuple(faults),
        )

    def __str__(self) -> str:
        rows, save = ("S3" if remote else "disk" for remote in (self.rows_on_s3, self.save_on_s3))
        traits = f"rows on {rows}, checkpoints on {save}, layout {self.layout}"
        traits += ", small disk" * self.on_small_disk + ", W&B" * self.with_wandb
        return f"job {self.number}: {traits}; {', '.join(fault.name for fault in self.faults)}"


@dataclass
class Outcome:
    """The end of a job, and what it took."""

    plan: Plan
    num_commands: int = 0
    num_restarts: int = 0
    struck: Counter[str] = field(default_factory=Counter)
    """kind of fault -> how often"""
    rows_lost: int = 0
    """rows that were not trained as often as in the twin"""
    steps_lost: int = 0
    """steps that were trained again though a complete checkpoint held them"""
    differences: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    is_finished: bool = False

    @property
    def is_survived(self) -> bool:
        """Return whether the run is as if nothing had happened."""
        lost = self.rows_lost + self.steps_lost
        return self.is_finished and not lost and not self.differences and not self.unexpected


class Job:
    """A run under faults.

    Args:
        folder: for what it writes, and for the logs of unexpected ends.
        report: told each event.
    """

    def __init__(
        self,
        plan: Plan,
        workspace: Workspace,
        store: Store,
        folder: Path,
        report: Callable[[str], None],
    ) -> None:
        self.outcome = Outcome(plan)
        self._plan = plan
        self._workspace = workspace
        self._store = store
        self._folder = folder
        self._report = report
        self._disk = folder / "disk" if plan.on_small_disk else None
        home = self._disk or folder
        self._save = f"s3://soak/job-{plan.number}" if plan.save_on_s3 else str(home / "run")
        self._export = folder / "export"
        self._safe: list[tuple[int, int]] = []
        """at each fault: entries of starts.jsonl, steps of the newest complete checkpoint"""
        self._statuses: set[int] = {0}

    def run(self, twin: Path) -> Outcome:
        """Run to the end, and compare with the twin's folder."""
        self._folder.mkdir(parents=True)
        faults = list(self._plan.faults)

        with self._mounted():
            self._store.weather.is_on = True
            try:
                if self._plan.begins_read_only:
                    self._begin_read_only()
                for _ in range(MAX_COMMANDS):
                    self.outcome.num_commands += 1
                    if self._is_finished_by_command(faults):
                        self.outcome.is_finished = True
                        break
                else:
                    self.outcome.unexpected.append(f"not finished by {MAX_COMMANDS} commands")
            finally:
                self._store.weather.is_on = False
                self.outcome.struck.update(self._store.weather.counts)
                self._store.weather.counts.clear()
            self._judge(twin)
        return self.outcome

    def clean(self) -> None:
        """Remove what the job wrote, but for the logs of unexpected ends."""
        if self._plan.save_on_s3:
            self._store.clear(self._save)
        if self.outcome.is_survived:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _flags(self) -> dict[str, Any]:
        flags: dict[str, Any] = {
            **flags_of(self._plan.layout),
            "save_hf": self._export,
            "distributed_timeout_minutes": 4,
        }
        if self._plan.rows_on_s3:
            words = []
            for name, path in self._workspace.sources.items():
                words += [name, f"s3://soak/rows/{Path(path).name}"]
            flags["prompt_data"] = words
        if self._plan.with_wandb:
            flags |= {"use_wandb": True, "wandb_mode": "offline"}
            flags["wandb_dir"] = self._folder / "wandb"
        return flags

    def _is_finished_by_command(self, faults: list[Fault]) -> bool:
        """Give the command, and strike meanwhile; return whether the run is finished."""
        environment = {**self._store.environment, "MILES_CACHE": str(self._folder / "cache")}
        with self._workspace.command(self._save, environment, **self._flags()) as command:
            begun = time.monotonic()
            printed, changed = 0, begun
            gap_begun, num_safe = begun, self._num_safe()
            while _is_running(command):
                if faults and self._is_due(faults[0].gap, gap_begun, num_safe):
                    self._strike(faults.pop(0), command)
                    gap_begun, num_safe = time.monotonic(), self._num_safe()
                if len(command.printed) != printed:
                    printed, changed = len(command.printed), time.monotonic()
                if time.monotonic() - changed > STUCK_SECONDS:
                    self._keep(command, "stuck", _stacks(command.process.pid))
                    command.process.kill()
                    self._statuses.add(-signal.SIGKILL)
            return self._has_finished(command)

    def _is_due(self, gap: Gap, begun: float, num_safe: int) -> bool:
        if time.monotonic() - begun < gap.seconds:
            return False
        return not gap.after_checkpoint or self._num_safe() > num_safe

    def _strike(self, fault: Fault, command: Command) -> None:
        safe = len(self._starts()), self._num_safe()
        scene = Scene(psutil.Process(command.process.pid), self._store.weather, self._disk)
        if not fault.strike(scene):
            self._report(f"  nothing there: {fault.name}")
            return
        self._safe.append(safe)
        self._statuses.update(fault.statuses)
        self.outcome.struck[fault.name] += 1
        self._report(f"  {fault.name} ({safe[1]} steps are safe)")

    def _has_finished(self, command: Command) -> bool:
        """Judge how a command ended; return whether the run is finished."""
        status, printed = command.process.returncode, command.printed
        num_errors = printed.count("miles: error:")
        self._report(f"  exit status {status}")

        if "Traceback" in printed:
            self._keep(command, "traceback")
        elif status == LOST and _BUSY in printed:
            self.outcome.struck["busy machine: Ray did not start"] += 1
        elif status not in self._statuses:
            self._keep(command, f"exit status {status}")
        elif status > 0 and num_errors != 1:
            self._keep(command, f"{num_errors} messages of an error")

        if status > 0:
            error = printed.rpartition("miles: error:")[2]
            self._report(f"  {' '.join(error.split())[:300]}")
            # Storms end, and disks have room again; a restart loop of the user waits a little.
            time.sleep(5)
        return status == 0

    def _keep(self, command: Command, what: str, more: str = "") -> None:
        """Note an end that was not expected, and keep what the command printed."""
        log = self._folder / f"unexpected-{self.outcome.num_commands}.log"
        log.write_text(f"{self._plan}\n{what}\n\n{command.printed}\n{more}")
        self.outcome.unexpected.append(f"job {self._plan.number}: {what} ({log})")
        self._report(f"  UNEXPECTED: {what} ({log})")

    def _begin_read_only(self) -> None:
        """Give the command once while the disk is read-only: it is to be refused by one sentence."""
        assert self._disk is not None
        if not _remounted(self._disk, "ro"):
            return
        self._statuses.add(5)
        self.outcome.struck["disk: read-only"] += 1
        self._report("  disk: read-only")
        if self._is_finished_by_command([]):
            self.outcome.unexpected.append("a run on a read-only disk says that it is finished")
        _remounted(self._disk, "rw")
        self._statuses.discard(5)

    @contextlib.contextmanager
    def _mounted(self) -> Iterator[None]:
        if self._disk is None:
            yield
            return
        self._disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(self._disk)]
        subprocess.run(mount, check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(self._disk)], check=True)

    # --- what the run has left

    def _read(self, name: str) -> str:
        """Return a file of the run's folder; "" where there is none."""
        if self._plan.save_on_s3:
            return self._store.read(f"{self._save}/{name}").decode()
        path = Path(self._save) / name
        return path.read_text() if path.exists() else ""

    def _starts(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._read("starts.jsonl").splitlines()]

    def _num_safe(self) -> int:
        return int(self._read("latest_checkpointed_iteration.txt") or 0)

    def _judge(self, twin: Path) -> None:
        """Compare the run with its twin, and count what was lost."""
        outcome = self.outcome
        starts = self._starts()
        outcome.num_restarts = sum("start" in entry for entry in starts) - 1
        for num_entries, num_safe in self._safe:
            for entry in starts[num_entries:]:
                outcome.steps_lost += max(0, num_safe - entry.get("first_step", num_safe))
        if not outcome.is_finished:
            return

        ledger = json.loads(self._read("ledger.json"))
        expected = json.loads((twin / "ledger.json").read_text())
        outcome.rows_lost = num_rows_apart(ledger, expected)
        for name in ("metrics.jsonl", "rejects.jsonl"):
            if _records(self._read(name)) != _records((twin / name).read_text()):
                outcome.differences.append(f"job {self._plan.number}: {name}")
        if ledger != expected:
            outcome.differences.append(f"job {self._plan.number}: ledger.json")
        if weights(self._export) != weights(twin / "export"):
            outcome.differences.append(f"job {self._plan.number}: weights")


def flags_of(layout: int) -> dict[str, Any]:
    """Return the flags that a job and its twin have in common."""
    return {
        **LAYOUTS[layout],
        "num_rollout": NUM_STEPS,
        "save_interval": 4,
        "keep_last": 3,
        "shuffle_window": 128,
        "prefetch_steps": 2,
    }


def _records(text: str) -> list[dict[str, Any]]:
    """Return the records of JSON lines without times, and without the folder of a file."""
    records = records_without_times(text)
    for record in records:
        if "file" in record:
            record["file"] = Path(record["file"]).name
    return records


def _is_running(command: Command) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        command.process.wait(0.2)
    return command.process.poll() is None


def _stacks(pid: int) -> str:
    done = subprocess.run(["py-spy", "dump", "--pid", str(pid)], capture_output=True, text=True)
    return done.stdout + done.stderr


def _remounted(disk: Path, option: str) -> bool:
    words = ["mount", "-o", f"remount,{option}", str(disk)]
    return subprocess.run(words, capture_output=True).returncode == 0


def num_rows_apart(ledger: dict[str, Any], expected: dict[str, Any]) -> int:
    """Return how many rows two ledgers count differently."""
    num_rows = 0
    for source, account in expected.items():
        mine = ledger.get(source, {}).get("counts", {})
        for name, count in account["counts"].items():
            num_rows += abs(count - mine.get(name, 0))
    return num_rows
