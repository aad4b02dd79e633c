"""Packing a hundred thousand samples for a few ranks and for many.

    python benchmarks/pack.py

A step's samples are packed in the loader, so packing must cost next to nothing beside encoding
them. The lengths are drawn as those of instruction data: most near 100 tokens, few of a thousand.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from _common import Bar, add_check_flag, exit_where_missed, print_bars
from rich.console import Console

from miles.data.config import PackConfig
from miles.data.packing.pack import pack

MAX_TOKENS = 8192
DP_SIZES = (8, 1024)
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--max-seconds", type=float, default=1.0, help="the fastest of 3 rounds")
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
    print_bars(bars, Console(width=100))
    if flags.check:
        exit_where_missed(bars)


def _seconds(lengths: np.ndarray, config: PackConfig) -> float:
    """Return how long packing takes; every sample is packed once."""
    started = time.perf_counter()
    ranks = pack(lengths, config)
    seconds = time.perf_counter() - started
    assert sum(len(batch) for rank in ranks for batch in rank) == len(lengths)
    return seconds


if __name__ == "__main__":
    main()
