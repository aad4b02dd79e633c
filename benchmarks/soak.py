"""An hour of faults: jobs one after another, each compared with a run to which nothing happened.

    python -m benchmarks.soak --minutes 60 --seed 1 --folder /tmp/soak

Kills of any process, pauses, an object store on a bad day, full and read-only disks. Exit status 1
where a row or a step of a complete checkpoint is lost, a run differs from its twin, or a command
ended in a way that its faults do not explain; its output is kept in the folder. The same seed draws
the same jobs and the same faults in the same order.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

from benchmarks._soak_job import LAYOUTS, Job, Outcome, Plan, flags_of
from benchmarks._soak_storage import Store, object_store
from tests.support.commands import Workspace


class _Ended(Exception):
    """SIGTERM came."""


def _end(number: int, frame: FrameType | None) -> None:
    raise _Ended


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no job begins")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    parser.add_argument("--first-job", type=int, default=0, metavar="N", help="to replay job N")
    parser.add_argument("--folder", type=Path, help="for the logs; by default a temporary one")
    flags = parser.parse_args()

    signal.signal(signal.SIGTERM, _end)
    folder = flags.folder or Path(tempfile.mkdtemp(prefix="miles-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    soak = Soak(folder, flags.seed)
    soak.report(f"soak: --seed {flags.seed}, {flags.minutes:g} minutes, logs in {folder}")
    try:
        soak.run(flags.minutes * 60, flags.first_job)
    except (_Ended, KeyboardInterrupt) as signalled:
        soak.report(f"ended by {'SIGTERM' if isinstance(signalled, _Ended) else 'Ctrl-C'}")
    soak.show()
    sys.exit(int(soak.has_losses))


class Soak:
    """Jobs one after another, and what they came to.

    Args:
        folder: for logs, twins and the table (`soak.txt`).
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._seed = seed
        self._outcomes: list[Outcome] = []
        self._begun = time.monotonic()
        self._sessions = tempfile.mkdtemp(prefix="soak-", dir="/tmp")
        # A path of Ray's sockets has few characters to spend.
        os.environ["RAY_TMPDIR"] = self._sessions

    @property
    def has_losses(self) -> bool:
        """Return whether anything is not as it should be."""
        return not all(outcome.is_survived for outcome in self._outcomes)

    def report(self, text: str) -> None:
        """Print a line with the time since the beginning."""
        print(f"{(time.monotonic() - self._begun) / 60:6.1f} min  {text}", flush=True)

    def enter(self, outcome: Outcome) -> None:
        """Add a job that has ended."""
        self._outcomes.append(outcome)

    def run(self, seconds: float, first_job: int) -> None:
        """Run jobs until the time is up."""
        workspace = Workspace(self._folder / "workspace")
        may_mount = _may_mount(self._folder / "probe")
        weather_draw = random.Random(self._seed)  # noqa: S311
        with object_store(weather_draw) as store:
            for path in workspace.sources.values():
                store.write(f"s3://soak/rows/{Path(path).name}", Path(path).read_bytes())
            twins = [self._twin(workspace, layout) for layout in range(len(LAYOUTS))]

            number = first_job
            begun = time.monotonic()
            while time.monotonic() - begun < seconds:
                plan = Plan.draw(self._seed, number, may_mount=may_mount)
                self._run_job(plan, workspace, store, twins[plan.layout])
                number += 1

    def _run_job(self, plan: Plan, workspace: Workspace, store: Store, twin: Path) -> None:
        self.report(str(plan))
        job = Job(plan, workspace, store, self._folder / f"job-{plan.number}", self.report)
        try:
            job.run(twin)
        except _Ended:
            raise
        except Exception as error:  # of the soak itself, or a run's process that does not end
            job.outcome.unexpected.append(f"{plan}: {type(error).__name__}: {error}"[:2000])
        self.enter(job.outcome)
        job.clean()
        for session in Path(self._sessions).iterdir():
            shutil.rmtree(session, ignore_errors=True)
        verdict = "survived" if job.outcome.is_survived else "NOT survived"
        self.report(f"  {verdict}: {job.outcome.num_commands} commands")
        self.show()

    def _twin(self, workspace: Workspace, layout: int) -> Path:
        save = self._folder / f"twin-{layout}"
        if not (save / "ledger.json").exists():
            with workspace.command(save, save_hf=save / "export", **flags_of(layout)) as command:
                command.process.wait()  # as long as a busy machine takes
                command.wait(0)
        self.report(f"twin {layout} is there")
        return save

    def show(self) -> None:
        """Print the table, and write it into the folder."""
        with (self._folder / "soak.txt").open("w") as stream:
            for file in (sys.stdout, stream):
                console = Console(file=file, width=100)
                console.print(self._table())
        sys.stdout.flush()

    def _table(self) -> Table:
        outcomes = self._outcomes
        minutes = (time.monotonic() - self._begun) / 60
        table = Table("", "injected", "survived", title=f"{minutes:.0f} min, seed {self._seed}")
        for name, num_struck, num_survived in _by_kind(outcomes):
            table.add_row(name, str(num_struck), str(num_survived))
        table.add_section()

        unexpected = [end for outcome in outcomes for end in outcome.unexpected]
        differences = [name for outcome in outcomes for name in outcome.differences]
        sums = {
            "jobs": len(outcomes),
            "commands": sum(outcome.num_commands for outcome in outcomes),
            "restarts and resumes": sum(outcome.num_restarts for outcome in outcomes),
            "rows lost": sum(outcome.rows_lost for outcome in outcomes),
            "steps lost beyond the checkpoint": sum(outcome.steps_lost for outcome in outcomes),
            "differences from the twin": len(differences),
            "unexpected ends": len(unexpected),
        }
        for name, number in sums.items():
            table.add_row(name, str(number), "")
        for text in [*differences, *unexpected]:
            table.add_row(text, "", "")
        return table


def _by_kind(outcomes: Sequence[Outcome]) -> list[tuple[str, int, int]]:
    """Return kind of fault, how often it struck, and how often its run survived."""
    struck: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    for outcome in outcomes:
        struck.update(outcome.struck)
        if outcome.is_survived:
            survived.update(outcome.struck)
    total = ("all faults", struck.total(), survived.total())
    return [*((name, struck[name], survived[name]) for name in sorted(struck)), total]


def _may_mount(folder: Path) -> bool:
    """Return whether this user may mount a small disk."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


if __name__ == "__main__":
    main()
