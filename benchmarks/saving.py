"""Steps beside a checkpoint that is being written to a slow disk, against steps before it.

    python benchmarks/saving.py

`miles train` on the demo's rows and a small model, on one CPU rank. Every `fsync` of the run takes
seconds, as on a slow disk; the steps go on meanwhile. The ratio is what is claimed: median seconds
of a step during the save to those before it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import Bar, add_check_flag, exit_where_missed, print_bars
from rich.console import Console

from miles.convert.hf_to_megatron import hf_to_megatron
from miles.demo import rows
from miles.demo.model import build_model
from miles.demo.tokenizer import build_tokenizer

SLOW_FSYNC = """\
import os, time
fsync = os.fsync
os.fsync = lambda file: (time.sleep({seconds}), fsync(file))[1]
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fsync-seconds", type=float, default=4.0)
    parser.add_argument("--save-interval", type=int, default=30)
    parser.add_argument("--max-ratio", type=float, default=1.2)
    add_check_flag(parser)
    flags = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="miles-saving-") as folder:
        seconds = _train(Path(folder), flags)
    first = flags.save_interval
    before = seconds[5:first]
    during = seconds[first + 1 : 2 * first]
    ratio = statistics.median(during) / statistics.median(before)
    print(
        f"{len(before)} steps before the save: {statistics.median(before) * 1e3:.1f} ms; "
        f"{len(during)} beside it: {statistics.median(during) * 1e3:.1f} ms"
    )
    bars = [Bar("times as long beside a save", ratio, flags.max_ratio)]
    print_bars(bars, Console(width=100))
    if flags.check:
        exit_where_missed(bars)


def _train(folder: Path, flags: argparse.Namespace) -> list[float]:
    """Train with one checkpoint midway; return the seconds of each step."""
    files = rows.copy_rows(folder / "rows")
    build_tokenizer(rows.texts(), folder / "tokenizer")
    build_model(folder / "tokenizer", folder / "hf")
    hf_to_megatron(str(folder / "hf"), str(folder / "megatron"))

    slow_disk = folder / "slow"
    slow_disk.mkdir()
    (slow_disk / "sitecustomize.py").write_text(SLOW_FSYNC.format(seconds=flags.fsync_seconds))
    paths = [str(slow_disk), str(Path(__file__).parents[1])]
    options: dict[str, Any] = {
        "hf-checkpoint": folder / "hf",
        "ref-load": folder / "megatron",
        "save": folder / "run",
        "save-interval": flags.save_interval,
        "num-rollout": 2 * flags.save_interval,
        "rollout-batch-size": 32,
        "max-tokens-per-gpu": 1024,
        "max-bad-fraction": 0.05,
        "lr": 1e-3,
        "actor-num-gpus-per-node": 1,
    }
    words = [sys.executable, "-m", "miles.cli", "train", "--prompt-data"]
    words += [str(word) for pair in files.items() for word in pair]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    subprocess.run(
        words,
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["perf/step_seconds"] for line in lines]


if __name__ == "__main__":
    main()
