"""`miles train` to its first step: CPU seconds of all processes, and wall time, by stage.

    python benchmarks/startup.py                           # this version alone
    python benchmarks/startup.py --against ../old --check  # and another checkout, in turn

Two CPU trainers, a tiny model with the whole vocabulary of Qwen3, two loaders. The first step ends
with the first line of metrics.jsonl; then everything is killed. CPU seconds are those of every
process that inherits a variable of the command's environment, Ray's own included.

Stages overlap: each has its first beginning and its last end, in seconds since the command, and
the CPU seconds of its calls in all processes. Each round is a start with an empty cache of miles
and a second one with what the first has kept (`MILES_CACHE`), between starts of the other checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from _common import Bar, add_check_flag, add_sample_flags, exit_where_missed, print_bars
from _startup_marks import MARKED
from _startup_processes import VARIABLE, Processes
from rich.console import Console
from rich.table import Table

from miles.demo import rows
from miles.demo.model import TinySizes, build_model
from miles.demo.tokenizer import build_tokenizer

PROJECT = Path(__file__).resolve().parents[1]
SIZES = TinySizes(hidden_size=64, ffn_hidden_size=128, num_layers=2, kv_channels=16)
LIMIT_SECONDS = 300.0
LOOK_SECONDS = 0.05

SITE = """\
import sys
sys.path.insert(0, {folder!r})
import _startup_marks
_startup_marks.install()
sys.path.remove({folder!r})
"""


@dataclass(frozen=True)
class Stage:
    """A stage of a start, over all processes that it ran in."""

    begin: float
    """of the first call, in seconds since the command"""
    end: float
    """of the last"""
    cpu_seconds: float
    """of all calls, each with the threads of its process"""


@dataclass(frozen=True)
class Start:
    """A start, to its first step."""

    wall_seconds: float
    cpu_seconds: dict[str, float]
    """by the role of the processes"""
    stages: dict[str, Stage]

    @property
    def all_cpu_seconds(self) -> float:
        return sum(self.cpu_seconds.values())


def main() -> None:
    flags = _parse()
    starts: dict[str, list[Start]] = {}
    with tempfile.TemporaryDirectory(prefix="miles-st-") as name:
        folder = Path(name)
        words = _prepare(folder, flags)
        for number in range(flags.rounds):
            cache = folder / f"cache-{number}"
            if flags.against:
                _add(starts, "the other", _start(folder, words, Path(flags.against), cache))
            _add(starts, "this", _start(folder, words, PROJECT, cache))
            _add(starts, "this, second start", _start(folder, words, PROJECT, cache))

    console = Console(width=120)
    _print(starts, console)
    bars = _bars(starts, flags.max_ratio)
    print_bars(bars, console)
    if flags.json:
        content = {name: [_as_json(start) for start in of] for name, of in starts.items()}
        Path(flags.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if flags.check:
        exit_where_missed(bars)


def _add(starts: dict[str, list[Start]], name: str, start: Start) -> None:
    starts.setdefault(name, []).append(start)
    print(f"{name}: {start.all_cpu_seconds:.1f} CPU s, {start.wall_seconds:.1f} s", flush=True)


def _prepare(folder: Path, flags: argparse.Namespace) -> list[str]:
    """Build the model; return the words of the command but for its run folder."""
    tokenizer = Path(flags.tokenizer)
    files = {"rows": Path(flags.source)}
    if not tokenizer.exists():
        files = rows.copy_rows(folder / "rows")
        tokenizer = folder / "tokenizer"
        build_tokenizer(rows.texts(), tokenizer)
    build_model(tokenizer, folder / "hf", sizes=SIZES)

    site = folder / "site"
    site.mkdir()
    content = SITE.format(folder=str(Path(__file__).parent))
    (site / "sitecustomize.py").write_text(content, encoding="utf-8")

    words = [sys.executable, "-m", "miles.cli", "train", "--hf-checkpoint", str(folder / "hf")]
    words.append("--prompt-data")
    for source, file in files.items():
        words += [source, str(file)]
    words += ["--rollout-batch-size", str(flags.batch_size), "--num-rollout", "2"]
    words += ["--max-tokens-per-gpu", "2048", "--max-bad-fraction", "0.05", "--lr", "1e-3"]
    words += ["--actor-num-gpus-per-node", str(flags.trainers), "--loader-cpus", "2"]
    return words


def _start(folder: Path, words: Sequence[str], checkout: Path, cache: Path) -> Start:
    """Start a run of a checkout; return what it took to its first step, and end it."""
    with tempfile.TemporaryDirectory(prefix="s", dir=folder) as name:
        own = Path(name)
        (own / "marks").mkdir()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder / "site"), str(checkout)]),
            "MILES_STARTUP_MARKS": str(own / "marks"),
            "MILES_CACHE": str(cache),
            "RAY_TMPDIR": name,
            VARIABLE: name,
        }
        environment.pop("RAY_ADDRESS", None)

        processes = Processes(name)
        printed = own / "printed"
        began = time.time()
        with printed.open("wb") as output:
            command = subprocess.Popen(
                [*words, "--save", str(own / "run")],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=own,
            )
            try:
                _until_first_step(command, own / "run/metrics.jsonl", processes, printed)
                wall_seconds = time.time() - began
            finally:
                processes.kill()
                command.wait()

        return Start(wall_seconds, processes.seconds(), _stages(own / "marks", began))


def _until_first_step(
    command: subprocess.Popen[bytes], metrics: Path, processes: Processes, printed: Path
) -> None:
    """Watch the processes of a command until a run has written its first step."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (metrics.exists() and metrics.read_bytes().endswith(b"\n")):
        processes.look()
        if command.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"there was no first step:\n{printed.read_text()}")
        time.sleep(LOOK_SECONDS)
    processes.look()


def _stages(marks: Path, began: float) -> dict[str, Stage]:
    """Return the stages of a start, from the marks of its processes."""
    found: dict[str, Stage] = {}
    for path in marks.iterdir():
        for line in path.read_text().splitlines():
            mark = json.loads(line)
            begin = mark["begin"] - began
            end = mark["end"] - began
            before = found.get(mark["name"], Stage(begin, end, 0.0))
            found[mark["name"]] = Stage(
                min(before.begin, begin),
                max(before.end, end),
                before.cpu_seconds + mark["cpu_seconds"],
            )
    return found


def _bars(starts: dict[str, list[Start]], max_ratio: float) -> list[Bar]:
    """Return the bars of this version against the other, each by its best round."""
    if "the other" not in starts:
        return []
    bars = []
    for name in ("this", "this, second start"):
        cpu = _least_cpu(starts[name]) / _least_cpu(starts["the other"])
        wall = _least_wall(starts[name]) / _least_wall(starts["the other"])
        bars.append(Bar(f"{name}: CPU seconds against the other", cpu, max_ratio))
        bars.append(Bar(f"{name}: wall time against the other", wall, max_ratio))
    return bars


def _least_cpu(starts: Sequence[Start]) -> float:
    return min(start.all_cpu_seconds for start in starts)


def _least_wall(starts: Sequence[Start]) -> float:
    return min(start.wall_seconds for start in starts)


def _best(starts: Sequence[Start]) -> Start:
    return min(starts, key=lambda start: start.all_cpu_seconds)


def _print(starts: dict[str, list[Start]], console: Console) -> None:
    """Print the best start of each contender: CPU seconds by process, and its stages."""
    best = {name: _best(of) for name, of in starts.items()}
    table = Table("CPU seconds", *best, title="to the first step", title_justify="left")
    roles = set().union(*(start.cpu_seconds for start in best.values()))
    for role in sorted(roles):
        table.add_row(role, *(f"{start.cpu_seconds.get(role, 0):.2f}" for start in best.values()))
    table.add_section()
    table.add_row("all", *(f"{start.all_cpu_seconds:.2f}" for start in best.values()))
    table.add_row("wall time, s", *(f"{_least_wall(of):.2f}" for of in starts.values()))
    console.print(table)

    table = Table("stage: wall s (CPU s)", *best)
    for functions in MARKED.values():
        for stage in functions.values():
            table.add_row(stage, *(_stage_text(start, stage) for start in best.values()))
    console.print(table)


def _stage_text(start: Start, name: str) -> str:
    stage = start.stages.get(name)
    if stage is None:
        return "-"
    return f"{stage.begin:.1f} to {stage.end:.1f} ({stage.cpu_seconds:.1f})"


def _as_json(start: Start) -> dict[str, object]:
    stages = {name: vars(stage) for name, stage in start.stages.items()}
    return {**vars(start), "stages": stages}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sample_flags(parser)
    parser.add_argument("--against", help="another checkout of miles, run in the same environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trainers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-ratio", type=float, default=0.5)
    parser.add_argument("--json", help="a file for all numbers")
    add_check_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
