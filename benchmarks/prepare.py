"""`miles prepare`, by command: a small set, and a million rows in one JSON array.

    python benchmarks/prepare.py --against ../miles-before

small    the rows of the sample as they are (Parquet): no Ray is started
array    `--rows` rows of the shape of OpenHermes in one JSON array, on all cores
notebook from `ds = prepare(...)` on a list of 300 dicts to its card, in a process of its own

Each command runs twice with one cache: the first one finds it empty. With `--against`, the `miles`
of another checkout prepares the same rows in turn, so that what else the machine does hits both;
the ratios are what is claimed. CPU time and memory are those of all processes, Ray's among them.
Then it says where a row's CPU time goes, in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from _common import Bar, add_check_flag, add_sample_flags, exit_where_missed, print_bars
from _process_tree import Cost, cost_of
from rich.console import Console
from rich.table import Table

from miles.common.garbage import collecting_rarely
from miles.data.config import DataConfig, EncodeConfig, OrderConfig, PackConfig, SourceConfig
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.rows.message_parts import LIMITS, PartMaker
from miles.data.stream import prepared, stages

OURS = Path(__file__).resolve().parents[1]
MAX_GIB = 1.0
NULLS = (
    *("custom_instruction", "topic", "model_name", "model", "views", "language", "id", "title"),
    *("idx", "hash", "avatarUrl", "system_prompt"),
)
"""Columns of OpenHermes that most rows leave empty."""
MARK = " (number of the row)"


@dataclass(frozen=True)
class Case:
    """A data set to prepare."""

    name: str
    path: Path
    num_rows: int
    max_ratio: float
    """bar: of the other checkout's wall time"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sample_flags(parser)
    add_check_flag(parser)
    parser.add_argument("--section", choices=("small", "array", "notebook"), help="only this one")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the array")
    parser.add_argument(
        "--rounds", type=int, default=2, help="of each case; the first has no cache"
    )
    parser.add_argument("--part-rows", type=int, default=20_000, help="rows that are taken apart")
    parser.add_argument("--against", type=Path, help="another checkout of miles")
    flags = parser.parse_args()

    console = Console(width=100)
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory(prefix="miles-prepare-") as name:
        folder = Path(name)
        if flags.section in (None, "notebook"):
            bars += run_notebook(flags, folder, console)
        cases = list(cases_of(flags, folder))
        for case in cases:
            bars += run_case(case, flags, folder, console)
        if cases:
            console.print(parts_table(cases[-1].path, flags.tokenizer, flags.part_rows))
    print_bars(bars, console)
    if flags.check:
        exit_where_missed(bars)


def cases_of(flags: argparse.Namespace, folder: Path) -> Iterator[Case]:
    """Yield the data sets to prepare; the array is written into the folder."""
    sample = Path(flags.source)
    if flags.section in (None, "small"):
        yield Case("small", sample, pq.read_metadata(sample).num_rows, 1 / 3)
    if flags.section in (None, "array"):
        array = folder / "rows.json"
        write_array(array, sample, flags.rows)
        yield Case("array", array, flags.rows, 45 / 120)


def run_case(case: Case, flags: argparse.Namespace, folder: Path, console: Console) -> list[Bar]:
    """Prepare a data set by each checkout in turn, some times; print the costs."""
    checkouts = {"ours": OURS}
    if flags.against:
        checkouts["theirs"] = flags.against.resolve()
    costs: dict[str, list[Cost]] = {name: [] for name in checkouts}
    for _ in range(flags.rounds):
        for name, checkout in checkouts.items():
            cache = folder / f"cache-{case.name}-{name}"
            costs[name].append(prepare_once(case.path, flags.tokenizer, checkout, folder, cache))

    console.print(costs_table(case, costs))
    peak_gib = max(cost.peak_bytes for cost in costs["ours"]) / 2**30
    bars = [Bar(f"{case.name}: GiB at most", peak_gib, MAX_GIB)]
    if flags.against:
        for what, ratio in ratios(costs["ours"], costs["theirs"]).items():
            bars.append(Bar(f"{case.name}: {what}, of theirs", ratio, case.max_ratio))
    return bars


def ratios(ours: list[Cost], theirs: list[Cost]) -> dict[str, float]:
    """Return our time as a share of theirs: of the first runs, and of the fastest of the others."""
    pairs = {"first run": (ours[:1], theirs[:1]), "again": (ours[1:], theirs[1:])}
    found = {}
    for name, (our_runs, their_runs) in pairs.items():
        if our_runs:
            found[f"{name}, wall time"] = _wall_seconds(our_runs) / _wall_seconds(their_runs)
            found[f"{name}, CPU time"] = _cpu_seconds(our_runs) / _cpu_seconds(their_runs)
    return found


def _wall_seconds(runs: list[Cost]) -> float:
    return min(run.wall_seconds for run in runs)


def _cpu_seconds(runs: list[Cost]) -> float:
    return min(run.cpu_seconds for run in runs)


def prepare_once(source: Path, tokenizer: str, checkout: Path, folder: Path, cache: Path) -> Cost:
    """Run the command of a checkout."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        line = [sys.executable, "-m", "miles.cli", "prepare", "openhermes"]
        line += ["--source", str(source), "--tokenizer", tokenizer, "--output", f"{output}/out"]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "MILES_CACHE": str(cache)}
        try:
            cost = cost_of(line, environment, folder)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{checkout}: {error}\n{error.stderr}")
        assert (Path(output) / "out/manifest.json").exists()
        return cost


def costs_table(case: Case, costs: dict[str, list[Cost]]) -> Table:
    """Return the costs of each run."""
    table = Table(title=f"{case.name}: {case.num_rows:,} rows", title_justify="left")
    for column in ("miles", "run", "wall s", "CPU s", "us of CPU a row", "GiB"):
        table.add_column(column, justify="left" if column == "miles" else "right")
    for name, runs in costs.items():
        for number, cost in enumerate(runs):
            table.add_row(
                name,
                "first" if number == 0 else "again",
                f"{cost.wall_seconds:.1f}",
                f"{cost.cpu_seconds:.1f}",
                f"{cost.cpu_seconds / case.num_rows * 1e6:.0f}",
                f"{cost.peak_bytes / 2**30:.2f}",
            )
    return table


# --- in a notebook

NOTEBOOK_ROWS = 300
NOTEBOOK_RATIO = 0.1
NOTEBOOK = """
import json, os, sys, time
rows, tokenizer, lines = json.load(open(sys.argv[1])), sys.argv[2], sys.argv[3]

def clock():
    return time.perf_counter(), sum(os.times()[:4])  # with child processes

started = clock()
from miles.data import prepare
imported = clock()
try:
    data = prepare("chat", source=rows, tokenizer=tokenizer)
except prepare.__globals__["ConfigError"]:  # of before it took rows themselves
    with open(lines, "w") as file:
        file.writelines(json.dumps(row) + "\\n" for row in rows)
    data = prepare("chat", source=lines, tokenizer=tokenizer)
data._repr_html_()
shown = clock()

import ray
seconds = [end - begin for begin, end in zip((*started, *imported), (*imported, *shown))]
print(json.dumps([*seconds, ray.is_initialized()]))
"""
"""Prints wall and CPU seconds of the import, then of the rest, and whether Ray was started."""


def run_notebook(flags: argparse.Namespace, folder: Path, console: Console) -> list[Bar]:
    """Time the card of a list of dicts by each checkout in turn, with a cold and a warm cache."""
    table = pq.read_table(flags.source).slice(0, NOTEBOOK_ROWS)
    rows = folder / "notebook.json"
    rows.write_text(json.dumps(table.select(["conversations"]).to_pylist()))
    checkouts = {"ours": OURS}
    if flags.against:
        checkouts["theirs"] = flags.against.resolve()

    runs: dict[str, list[list[float]]] = {name: [] for name in checkouts}
    for _ in range(max(flags.rounds, 2)):
        for name, checkout in checkouts.items():
            line = [sys.executable, "-c", NOTEBOOK, str(rows), flags.tokenizer]
            line.append(str(folder / f"{name}.jsonl"))
            cache = str(folder / f"cache-notebook-{name}")
            environment = {**os.environ, "PYTHONPATH": str(checkout), "MILES_CACHE": cache}
            # From a folder that is no checkout: Python looks for `miles` in its own first.
            done = subprocess.run(
                line, env=environment, cwd=folder, capture_output=True, text=True, check=True
            )
            *seconds, has_ray = json.loads(done.stdout.splitlines()[-1])
            assert not (name == "ours" and has_ray), "a card needs no Ray"
            runs[name].append(seconds)

    shown = Table(title=f"notebook: a card of {NOTEBOOK_ROWS} dicts", title_justify="left")
    for column in ("miles", "cache", "import: wall s", "CPU s", "to the card: wall s", "CPU s"):
        shown.add_column(column)
    for name, costs in runs.items():
        for number, seconds in enumerate(costs):
            shown.add_row(
                name, "warm" if number else "cold", *(f"{value:.2f}" for value in seconds)
            )
    console.print(shown)

    bars = []
    if flags.against:
        for state, which in (("cold", slice(0, 1)), ("warm", slice(1, None))):
            for column, what in ((2, "wall time"), (3, "CPU time")):
                ours, theirs = (min(run[column] for run in runs[name][which]) for name in runs)
                text = f"notebook, {state} cache: {what}, of theirs"
                bars.append(Bar(text, ours / theirs, NOTEBOOK_RATIO))
    return bars


# --- where the time goes


def parts_table(source: Path, tokenizer: str, num_rows: int) -> Table:
    """Return the CPU time of each part of the work, over the first rows of a file, in one process."""
    with tempfile.TemporaryDirectory(prefix="miles-cache-") as cache:
        os.environ["MILES_CACHE"] = cache
        clock = _Clock()
        manifest = build_manifest([SourceConfig("rows", (str(source),))])
        index_us = clock.seconds() / manifest.num_rows * 1e6

        parts = _seconds_by_part(manifest, EncodeConfig(tokenizer), num_rows)
    table = Table(
        title="CPU time of a row, in one process", title_justify="left", show_header=False
    )
    table.add_row("count the rows, and look at the first", f"{index_us:.1f} us")
    for name, seconds in parts.items():
        table.add_row(name, f"{seconds / min(num_rows, manifest.num_rows) * 1e6:.1f} us")
    return table


def _seconds_by_part(manifest: Manifest, encode: EncodeConfig, num_rows: int) -> dict[str, float]:
    config = DataConfig(
        (SourceConfig("rows", ("",)),),
        OrderConfig(batch_size=LIMITS.group_rows, window_rows=LIMITS.part_rows),
        encode,
        PackConfig(1, encode.max_sample_tokens),
    )
    plan = stages.make_plan(manifest, config)
    encoder = stages.encoder_of(encode)
    windows = list(plan.windows(0))[: -(-num_rows // LIMITS.part_rows)]

    parts = dict.fromkeys(("read", "normalize, encode, make columns", "write Parquet"), 0.0)
    with collecting_rarely():
        for ref in windows:
            clock = _Clock()
            raw = list(stages.read_window(manifest, plan, ref, 0))
            parts["read"] += clock.seconds()
            steps = [stages.prepare_steps(table, manifest, encoder) for table in raw]
            parts["normalize, encode, make columns"] += clock.seconds()
            maker = PartMaker(LIMITS)
            for step in steps:
                maker.add(prepared.rows_of(step))
            maker.finish()
            parts["write Parquet"] += clock.seconds()
    return parts


class _Clock:
    """The CPU time of this process since it was asked last."""

    def __init__(self) -> None:
        self._at = time.process_time()

    def seconds(self) -> float:
        before, self._at = self._at, time.process_time()
        return self._at - before


# --- rows


def write_array(path: Path, sample: Path, num_rows: int) -> None:
    """Write rows of the sample again and again, each with texts of its own, as OpenHermes lies."""
    texts = [_text(row) for row in pq.read_table(sample).to_pylist()]
    with path.open("w", encoding="utf-8") as file:
        file.write("[\n")
        for number in range(num_rows):
            text = texts[number % len(texts)].replace(MARK, f" ({number})")
            file.write(f",\n{text}" if number else text)
        file.write("\n]\n")


def _text(row: dict[str, Any]) -> str:
    """Return a row as JSON text, with a mark at the end of each turn."""
    turns = [{**turn, "value": turn["value"] + MARK} for turn in row["conversations"]]
    content = {"skip_prompt_formatting": False, "conversations": turns, "source": row["source"]}
    return json.dumps({**dict.fromkeys(NULLS), **content}, indent=2)


if __name__ == "__main__":
    main()
