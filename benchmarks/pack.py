"""Packing a hundred thousand samples for a few ranks and for many; a loader's CPU time by part.

    python benchmarks/pack.py
    python benchmarks/pack.py --against OLDER_CHECKOUT

A step's samples are packed in the loader, so packing must cost next to nothing beside encoding
them. The lengths are drawn as those of instruction data: most near 100 tokens, few of a thousand.

The second part runs a loader's stages over real rows in one process, without Ray, and shows what
a row costs in each. With `--against`, an older checkout does the same in turn. CPU time, the best
of each part's rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from _common import Bar, add_check_flag, add_sample_flags, exit_where_missed, print_bars
from rich.console import Console
from rich.table import Table

from miles.data.config import PackConfig
from miles.data.packing.pack import pack

MAX_TOKENS = 8192
DP_SIZES = (8, 1024)
ROUNDS = 3
OWN_CHECKOUT = Path(__file__).resolve().parents[1]
CHILD = Path(__file__).with_name("_chain_costs.py")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--max-seconds", type=float, default=1.0, help="the fastest of 3 rounds")
    add_sample_flags(parser)
    parser.add_argument("--against", metavar="PATH", help="an older checkout, for the second part")
    parser.add_argument("--chain-rows", type=int, default=16_384, help="of the second part")
    parser.add_argument("--chain-rounds", type=int, default=5, help="of the second part")
    parser.add_argument("--max-outside", type=float, default=8.0, help="CPU us a row")
    add_check_flag(parser)
    flags = parser.parse_args()

    lengths = np.random.default_rng(5).lognormal(4.68, 0.6, flags.rows)
    lengths = np.minimum(lengths.astype(np.int32) + 8, MAX_TOKENS)
    bars = []
    for dp_size in DP_SIZES:
        config = PackConfig(dp_size=dp_size, max_tokens_per_gpu=MAX_TOKENS)
        seconds = min(_seconds(lengths, config) for _ in range(ROUNDS))
        bars.append(Bar(f"seconds, {dp_size:,} data ranks", seconds, flags.max_seconds))
    print(f"{flags.rows:,} samples, {int(lengths.sum()):,} tokens")
    checkouts = [Path(flags.against)] if flags.against else []
    costs = _chain_costs([*checkouts, OWN_CHECKOUT], flags)
    outside = [sum(_outside(cost).values()) for cost in costs]
    bars.append(Bar("CPU us a row outside normalize and encode", outside[-1], flags.max_outside))
    console = Console(width=100)
    console.print(_cost_table(costs))
    print_bars(bars, console)
    if flags.check:
        exit_where_missed(bars)


def _seconds(lengths: np.ndarray, config: PackConfig) -> float:
    """Return how long packing takes; every sample is packed once."""
    started = time.perf_counter()
    ranks = pack(lengths, config)
    seconds = time.perf_counter() - started
    assert sum(len(batch) for rank in ranks for batch in rank) == len(lengths)
    return seconds


def _chain_costs(checkouts: list[Path], flags: argparse.Namespace) -> list[dict[str, float]]:
    """Return for each checkout the CPU microseconds a row of each part, measured in turn."""
    best: list[dict[str, float]] = [defaultdict(lambda: float("inf")) for _ in checkouts]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="miles-pack-"))
        path = Path(folder) / "rows.parquet"
        rows = pq.read_table(flags.source).slice(0, flags.chain_rows)
        pq.write_table(rows, path, row_group_size=1_000)
        settings = {
            "paths": [str(path)],
            "tokenizer": str(Path(flags.tokenizer).resolve()),
            "batch_size": 128,
            "window_rows": 8_192,
            "dp_size": DP_SIZES[0],
        }
        children = [stack.enter_context(_child(path, settings)) for path in checkouts]
        for _ in range(flags.chain_rounds):
            for child, costs in zip(children, best, strict=True):
                measured = json.loads(_answer(child, "round"))
                for part, seconds in measured["seconds"].items():
                    costs[part] = min(costs[part], 1e6 * seconds / measured["rows"])
    return best


@contextlib.contextmanager
def _child(checkout: Path, settings: dict[str, object]) -> Iterator[subprocess.Popen[str]]:
    """Start a process that measures a checkout, and wait until it can begin."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(
        [sys.executable, str(CHILD), json.dumps(settings)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n", "the process that measures did not start"
        yield child


def _answer(child: subprocess.Popen[str], line: str) -> str:
    """Write a line to a child, and return the line that it writes."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(f"{line}\n")
    child.stdin.flush()
    return child.stdout.readline()


def _outside(costs: dict[str, float]) -> dict[str, float]:
    """Return the parts outside normalize and encode."""
    return {part: cost for part, cost in costs.items() if part not in ("normalize", "encode")}


def _cost_table(costs: list[dict[str, float]]) -> Table:
    """Return a table of the parts: before, if it was measured, and now."""
    table = Table("CPU us a row", *("before", "now")[-len(costs) :])
    for part in costs[-1]:
        table.add_row(part, *(f"{cost.get(part, 0.0):.2f}" for cost in costs))
    outside = [sum(_outside(cost).values()) for cost in costs]
    table.add_section()
    table.add_row("outside normalize and encode", *(f"{cost:.2f}" for cost in outside))
    if len(costs) > 1:
        table.add_row("times as cheap", "", f"{outside[0] / outside[1]:.2f}")
    return table


if __name__ == "__main__":
    main()
