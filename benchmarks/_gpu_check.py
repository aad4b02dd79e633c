"""Run the parts of benchmarks/gpu_check.sh, each in processes of its own, within one budget.

    part -> processes, each with a limit -> PART.log, and its JSON into results.json -> summary.md

A process that fails or takes too long is ended with all that it has started; the end of its output
is shown, and the next one goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from _gpu_summary import MOST_CHARACTERS, summarize

from miles.train.model import device

BENCHMARKS = Path(__file__).parent
ERROR_LINES = 30
LONGEST_LINE = 200
MOST_LOG_BYTES = 8 << 20

ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A virtual machine whose memory grows as it is used looks full to Ray from the beginning.
    "RAY_memory_monitor_refresh_ms": "0",
    "PYTHONWARNINGS": "ignore",
    "TORCHDYNAMO_DISABLE": "1",
}
"""Variables of every process, unless they are set already."""


@dataclass(frozen=True)
class Job:
    """A process of a part."""

    name: str
    words: Sequence[str | Path]
    limit_seconds: float
    takes_budget: bool = False
    """whether it takes the flag --budget, and begins nothing that would not end in time"""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The end of a process."""

    seconds: float
    status: str
    """"ok", or what went wrong"""
    output: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument(
        "--budget", type=float, default=float(os.environ.get("BUDGET_SECONDS", "480"))
    )
    flags = parser.parse_args()
    os.environ.update({name: text for name, text in ENVIRONMENT.items() if name not in os.environ})
    out = Path(os.environ.get("OUT") or "runs/gpu-check")
    out.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory(prefix="miles-gpu-check-") as scratch:
        jobs = parts(Path(scratch))
        unknown = [name for name in flags.parts if name not in jobs]
        if unknown:
            sys.exit(f"no part {unknown[0]}; the parts are {' '.join(jobs)}")
        check = Check(out, Path(scratch), time.monotonic() + flags.budget)
        for name in flags.parts or jobs:
            check.run_part(name, jobs[name])

    print(f"\n{check.write_summary()[:MOST_CHARACTERS]}")
    sys.exit(not check.is_good)


def parts(scratch: Path) -> dict[str, list[Job]]:
    """Return the processes of each part, in the order in which they run."""
    python = sys.executable
    step = [python, BENCHMARKS / "gpu_train.py"]

    def train(name: str, limit: float, *sections: str) -> Job:
        words = [*step, "--json", scratch / f"{name}.json", "--section", *sections]
        return Job(name, words, limit, takes_budget=True)

    # Each in a process of its own: what one does to the GPU, the next one does not inherit.
    on_gpu = [
        train("step", 90, "ceilings", "step", "profile"),
        train("peer", 75, "ceilings", "peer"),
        train("switches", 110, "switches"),
        train("further", 50, "ceilings", "further"),
    ]
    return {
        "tests": [_tests(scratch)],
        "demo": [
            Job("demo", [python, "-m", "miles.cli", "demo", "--output", scratch / "demo"], 100)
        ],
        "train": on_gpu
        if device.has_gpu()
        else [train("train", 60, "ceilings", "step", "profile", "peer", "switches", "further")],
        "estimate": [train("estimate", 45, "estimate")],
        "ray": [
            Job(
                "ray",
                [python, BENCHMARKS / "gpu_ray.py", "--json", scratch / "ray.json"],
                150,
                takes_budget=True,
            )
        ],
    }


def _tests(scratch: Path) -> Job:
    """Return the process of tests/gpu. Those of checkpoints, which fork, come last."""
    files = sorted(
        (BENCHMARKS.parent / "tests/gpu").glob("test_*.py"),
        key=lambda file: (file.name == "test_checkpoints.py", file.name),
    )
    words = [sys.executable, "-m", "pytest", *files, "-v", "--timeout=60", "--tb=short"]
    words += ["--show-capture=no", "--durations=6", f"--junit-xml={scratch / 'tests.xml'}"]
    # Without a GPU they are run all the same, to show that they can be.
    environment = {} if device.has_gpu() else {"MILES_GPU_TESTS_ON_CPU": "1"}
    return Job("tests", words, 150, environment=environment)


class Check:
    """A run of some parts, and what they have found so far."""

    def __init__(self, out: Path, scratch: Path, deadline: float) -> None:
        self.out = out
        self.scratch = scratch
        self.deadline = deadline
        # The tiny size, on processors.
        self.patience = 1 if device.has_gpu() else 4
        self.results: dict[str, dict[str, Any]] = {}

    @property
    def is_good(self) -> bool:
        return all(result["status"] == "ok" for result in self.results.values())

    def run_part(self, part: str, jobs: Sequence[Job]) -> None:
        """Run the processes of a part; write its log, the results and the summary."""
        log = ""
        for job in jobs:
            outcome = self._run(job)
            log += f"### {job.name}: {outcome.status}, {outcome.seconds:.0f} s\n{outcome.output}\n"
            print(f"{job.name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
            if outcome.status != "ok":
                print(tail(outcome.output), flush=True)
            self.results[job.name] = self._result(job.name, outcome)

            (self.out / f"{part}.log").write_text(log[-MOST_LOG_BYTES:])
            (self.out / "results.json").write_text(json.dumps(self.results, indent=1))
            self.write_summary()

    def write_summary(self) -> str:
        """Write the summary of all that was found so far, and return it."""
        summary = summarize(self.results)
        (self.out / "summary.md").write_text(summary)
        return summary

    def _run(self, job: Job) -> Outcome:
        """Run a process within its limit and the budget."""
        limit = min(job.limit_seconds * self.patience, self.deadline - time.monotonic())
        if limit <= 5:
            return Outcome(0.0, "no time was left", "")
        words = [str(word) for word in job.words]
        if job.takes_budget:
            words += ["--budget", str(round(0.8 * limit))]

        started = time.monotonic()
        output = self.scratch / f"{job.name}.out"
        with output.open("w") as file:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **job.environment},
                start_new_session=True,
            )
            status = "ok"
            try:
                code = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                status = f"ended after {limit:.0f} s"
            else:
                if code:
                    status = f"exit status {code}"
            finally:
                end(process)
        return Outcome(time.monotonic() - started, status, output.read_text(errors="replace"))

    def _result(self, name: str, outcome: Outcome) -> dict[str, Any]:
        """Return what is kept of a process: its own JSON too, if it has written one."""
        result: dict[str, Any] = {"status": outcome.status, "seconds": outcome.seconds}
        found = self.scratch / f"{name}.json"
        if found.exists():
            result["found"] = json.loads(found.read_text())
        junit = self.scratch / f"{name}.xml"
        if junit.exists():
            result["junit"] = junit.read_text()
        if outcome.status != "ok" or "found" not in result:
            result["tail"] = tail(outcome.output)
        return result


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process, its group, and all that it has started and that still runs."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.kill()
    process.wait()


def tail(output: str) -> str:
    """Return the last lines of an output, none of them very long."""
    lines = output.replace("\r", "\n").strip().splitlines()[-ERROR_LINES:]
    return "\n".join(line[:LONGEST_LINE] for line in lines)


if __name__ == "__main__":
    main()
