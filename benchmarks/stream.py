"""Files to packed steps in the hands of consumers, on two cores, through Ray Data and the feed.

    python benchmarks/stream.py                      # all sections, about 200,000 rows
    python benchmarks/stream.py --section resume --check

- steady: the stream's CPU time a row, by process and part; with `--against`, in turn with the stream
  of an older checkout; and the peer, which tokenises as Miles does it: a batch at a time, in one
  process, through transformers' template and mask functions
- slow: consumers that keep each step for 100 ms: how long they are without one, from asking to
  micro-batches in hand
- resume: the first step of an epoch against the first one behind 90 % of it
- feed: the cost of a block of the stream in the actor that hands it out, by the number of ranks
- growth: a set against one of 12 times the rows: the first step, and the peaks of memory

All contenders of a ratio run in the same run, in turn. The ratios are what is claimed; the absolute
numbers are the machine's. Each run has processes and a Ray of its own. With `--check`, a bar that
is missed is exit status 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import _peer
import _stream_runs as runs
from _common import Bar, add_check_flag, add_sample_flags, exit_where_missed
from rich.console import Console
from rich.table import Table

from miles.data.config import DEFAULT_WINDOW_ROWS, StreamConfig

FEED_RANKS = (1, 8, 64, 1024)
MIB = 1 << 20


@dataclass(frozen=True)
class Section:
    """The findings of a section."""

    title: str
    lines: list[tuple[str, str]]
    bars: list[Bar]
    raw: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return the bars and the raw numbers."""
        return {"bars": [{**vars(bar), "is_met": bar.is_met} for bar in self.bars], **self.raw}


def main() -> None:
    flags = _parse()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: flags.cores]))

    console = Console(width=110, stderr=flags.json == "-")
    sections: dict[str, Section] = {}
    with tempfile.TemporaryDirectory(prefix="miles-stream-") as folder:
        for name in flags.section or SECTIONS:
            sections[name] = SECTIONS[name](flags, Path(folder))
            _print(console, sections[name])

    content = json.dumps({name: section.as_json() for name, section in sections.items()}, indent=1)
    if flags.json == "-":
        sys.stdout.write(content + "\n")
    elif flags.json:
        Path(flags.json).write_text(content + "\n", encoding="utf-8")
    if flags.check:
        exit_where_missed(list(chain.from_iterable(section.bars for section in sections.values())))


def steady(flags: argparse.Namespace, folder: Path) -> Section:
    """Measure the stream's CPU time; compare it with an older stream's, and with the peer."""
    setup = _setup(flags, folder)
    streams = []
    older = []
    for _ in range(flags.steady_rounds):
        streams.append(runs.in_own_process(runs.stream_pass, setup))
        if flags.against:
            older.append(runs.stream_pass_of(Path(flags.against), setup))
    peer = runs.in_own_process(
        _peer.batch_by_batch,
        setup.paths,
        setup.tokenizer,
        setup.batch_size,
        min(flags.peer_rows, flags.rows),
    )

    ours = _median_round(streams)
    # The peer gets fewer rows; its start-up counts once, as ours does.
    batches_seconds = peer["batches_seconds"] * ours["num_rows"] / peer["num_rows"]
    peer_seconds = peer["start_up_seconds"] + batches_seconds
    ratio = peer_seconds / ours["whole_seconds"]

    bars = [Bar("CPU us a row outside normalize and encode", _outside_us(ours), flags.max_outside)]
    lines = _cost_lines("", ours, streams)
    if older:
        before = _median_round(older)
        gain = _whole_us(before) / _whole_us(ours)
        bars.append(Bar("rows a CPU second, against before", gain, flags.min_gain, is_lower=True))
        lines += _cost_lines("before: ", before, older)
    if flags.min_peer_ratio is not None:
        bars.append(Bar("times the peer", ratio, flags.min_peer_ratio, is_lower=True))
    lines += [
        *_end_to_end_lines(ours, peer, peer_seconds),
        ("peak memory", _peaks(ours["peak_bytes"])),
    ]
    title = (
        f"steady: {ours['num_rows']:,} rows, {ours['num_tokens']:,} tokens, "
        f"{ours['num_steps']:,} steps"
    )
    raw = {"peer_ratio": ratio, "streams": streams, "before": older, "peer": peer}
    return Section(title, lines, bars, raw)


def _outside_us(stream: dict[str, Any]) -> float:
    """Return the CPU microseconds a row of all processes, without normalize and encode."""
    loader = stream["loader_us"]
    return _whole_us(stream) - loader["normalize"] - loader["encode"]


def _whole_us(stream: dict[str, Any]) -> float:
    """Return the CPU microseconds a row of all processes."""
    return sum(stream["loader_us"].values()) + sum(stream["others_us"].values())


def _median_round(streams: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the round whose cost outside normalize and encode is the median."""
    return sorted(streams, key=_outside_us)[(len(streams) - 1) // 2]


def _cost_lines(
    prefix: str, shown: dict[str, Any], streams: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    """Return the lines on the CPU time of a stream, from the round that is shown."""
    outside = [_outside_us(stream) for stream in streams]
    return [
        (
            f"{prefix}CPU, us a row, outside normalize and encode",
            f"{_outside_us(shown):.1f} (median of {len(outside)}: "
            f"{min(outside):.1f} to {max(outside):.1f})",
        ),
        ("  a loader", _numbers(shown["loader_us"])),
        ("  others", _numbers(shown["others_us"])),
        (
            f"{prefix}rows a CPU second",
            f"{1e6 / _whole_us(shown):,.0f} ({_whole_us(shown):.1f} us a row)",
        ),
        (
            f"{prefix}after the first step",
            f"{shown['steady_rows_per_second']:,.0f} rows/s, "
            f"{shown['steady_tokens_per_second']:,.0f} tokens/s",
        ),
    ]


def _end_to_end_lines(
    ours: dict[str, Any], peer: dict[str, float], peer_seconds: float
) -> list[tuple[str, str]]:
    """Return the lines that compare the stream with the peer, and its first step."""
    seconds = ours["whole_seconds"]
    num_rows = ours["num_rows"]
    return [
        (
            "stream, end to end",
            f"{num_rows / seconds:,.0f} rows/s, {ours['num_tokens'] / seconds:,.0f} tokens/s "
            f"({seconds:.1f} s with Ray's start)",
        ),
        (
            "peer, end to end",
            f"{num_rows / peer_seconds:,.0f} rows/s "
            f"({peer_seconds:.1f} s, from {peer['num_rows']:,} rows)",
        ),
        ("end to end against the peer", f"{peer_seconds / seconds:.1f} times"),
        (
            "first step",
            f"{ours['first_step_seconds']:.2f} s from Feed.open, "
            f"{ours['first_step_with_ray_seconds']:.2f} s with Ray's start",
        ),
    ]


def slow(flags: argparse.Namespace, folder: Path) -> Section:
    """Measure how long consumers that rest between steps are without one."""
    setup = _setup(flags, folder, window_rows=flags.slow_window)
    got = runs.in_own_process(runs.stream_pass, setup, flags.hold_seconds, flags.slow_steps)
    share = got["steady_wait_seconds"] / got["steady_seconds"]
    depths = got["queue_depths"][1:]

    lines = [
        (
            "waited after the first step",
            f"{got['steady_wait_seconds']:.3f} s of {got['steady_seconds']:.1f} s",
        ),
        ("longest wait", f"{got['longest_wait_seconds'] * 1e3:.0f} ms"),
        ("steps ready", f"{statistics.median(depths):.0f} (median), {min(depths)} at least"),
        ("peak memory", _peaks(got["peak_bytes"])),
    ]
    borders = (got["num_steps"] * setup.batch_size - 1) // setup.window_rows
    title = (
        f"slow: {got['num_steps']:,} steps of {setup.batch_size} rows, "
        f"each kept {flags.hold_seconds * 1e3:.0f} ms, "
        f"over {borders} borders of windows of {setup.window_rows:,} rows"
    )
    bars = [Bar("share of the time waited", share, flags.max_wait)]
    return Section(title, lines, bars, {"stream": got})


def resume(flags: argparse.Namespace, folder: Path) -> Section:
    """Compare the first step of an epoch with the first one after 90 % of it."""
    setup = _setup(flags, folder)
    consumed_rows = int(0.9 * flags.rows) // setup.batch_size * setup.batch_size
    zero, late = runs.in_own_process(
        runs.first_steps, [(setup, 0), (setup, consumed_rows)], flags.rounds
    )
    ratio = statistics.median(late) / statistics.median(zero)

    lines = [("from row 0", _seconds(zero)), (f"from row {consumed_rows:,}", _seconds(late))]
    title = f"resume: time to the first step, {flags.rows:,} rows, windows of {setup.window_rows:,}"
    raw = {"seconds_from_0": zero, "seconds_from_90_percent": late}
    return Section(title, lines, [Bar("90 % against 0", ratio, flags.max_resume)], raw)


def growth(flags: argparse.Namespace, folder: Path) -> Section:
    """Compare a set of rows with one of many times as many: the first step, and the memory."""
    folder = folder / "growth"
    if not folder.exists():
        folder.mkdir()
    paths = runs.write_files(folder, flags.source, flags.growth, flags.growth_rows)
    large = dataclasses.replace(_settings(flags, paths), window_rows=flags.growth_window)
    small = dataclasses.replace(large, paths=paths[:1])
    assert flags.growth_rows > flags.growth_window, "both sets must be larger than a window"

    times = runs.in_own_process(runs.first_steps, [(small, 0), (large, 0)], flags.rounds)
    # Consumers that the loader outruns, so that the most steps wait for them.
    passes = [
        runs.in_own_process(runs.stream_pass, setup, flags.growth_hold_seconds)
        for setup in (small, large)
    ]
    ratio = statistics.median(times[1]) / statistics.median(times[0])
    peaks = [stream["peak_bytes"] for stream in passes]

    lines = []
    for got, seconds, peak in zip(passes, times, peaks, strict=True):
        lines.append((f"{got['num_rows']:,} rows: first step", _seconds(seconds)))
        lines.append(("  peak memory", _peaks(peak)))

    bars = [Bar(f"first step, {flags.growth} times the rows", ratio, flags.max_growth_time)]
    for name in ("object store", "loader", "feed", "consumer"):
        grown = peaks[1][name] / max(peaks[0][name], 1)
        bars.append(
            Bar(f"peak of {name}, {flags.growth} times the rows", grown, flags.max_growth_memory)
        )
    title = (
        f"growth: {flags.growth_rows:,} rows and {flags.growth} times as many, "
        f"windows of {flags.growth_window:,}"
    )
    return Section(title, lines, bars, {"first_step_seconds": times, "streams": passes})


def feed(flags: argparse.Namespace, folder: Path) -> Section:
    """Measure the cost of a block of the stream in the actor that hands it out."""
    costs = runs.in_own_process(
        runs.handing_out, _setup(flags, folder), FEED_RANKS, flags.feed_rounds
    )
    lines = []
    for dp_size, by_cut in costs.items():
        for name, got in by_cut.items():
            lines.append(
                (
                    f"{dp_size:,} data ranks, a chunk for each {name}",
                    f"take {got['take_ms']:.1f} ms, cut and store {got['cut_ms']:.1f}, "
                    f"requests {got['ask_ms']:.1f} ({got['request_ms']:.2f} each); "
                    f"a rank reads it in {got['read_ms']:.1f}",
                )
            )
    block = costs[FEED_RANKS[0]]["node"]
    title = (
        f"feed: CPU time for a block of {block['num_rows']:,.0f} rows, "
        f"{block['num_tokens']:,.0f} tokens, {block['num_bytes'] / MIB:.1f} MiB"
    )
    return Section(title, lines, [], {"by_ranks": costs})


SECTIONS: dict[str, Callable[[argparse.Namespace, Path], Section]] = {
    "steady": steady,
    "slow": slow,
    "resume": resume,
    "growth": growth,
    "feed": feed,
}


def _setup(flags: argparse.Namespace, folder: Path, window_rows: int | None = None) -> runs.Setup:
    """Return a stream over all rows. The first section that needs their files writes them."""
    rows = folder / "rows"
    if not rows.exists():
        rows.mkdir()
        runs.write_files(rows, flags.source, flags.files, -(-flags.rows // flags.files))
    setup = _settings(flags, tuple(str(path) for path in sorted(rows.iterdir())))
    return dataclasses.replace(setup, window_rows=window_rows or flags.window_rows)


def _settings(flags: argparse.Namespace, paths: tuple[str, ...]) -> runs.Setup:
    return runs.Setup(
        paths,
        flags.tokenizer,
        batch_size=flags.batch_size,
        window_rows=flags.window_rows,
        dp_size=flags.dp,
        loader_cpus=flags.cores,
        object_store_bytes=flags.object_store_mib * MIB,
        block_bytes=flags.block_kib << 10,
    )


def _seconds(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):.2f} s (median of {len(values)}: {low:.2f} to {high:.2f})"


def _numbers(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in values.items())


def _peaks(peak: dict[str, int]) -> str:
    order = ("object store", "spilled", "loader", "feed", "consumer")
    return ", ".join(f"{name} {peak[name] / MIB:,.0f} MiB" for name in order if peak.get(name))


def _print(console: Console, section: Section) -> None:
    table = Table(title=section.title, title_justify="left", show_header=False)
    for line in section.lines:
        table.add_row(*line)
    table.add_section()
    for bar in section.bars:
        table.add_row(bar.name, str(bar))
    console.print(table)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--section",
        action="append",
        choices=list(SECTIONS),
        help="may be given again; default: all",
    )
    add_sample_flags(parser)
    parser.add_argument("--rows", type=int, default=197_016)
    parser.add_argument("--files", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--window-rows", type=int, default=DEFAULT_WINDOW_ROWS)
    parser.add_argument("--dp", type=int, default=2, help="consumers")
    parser.add_argument("--cores", type=int, default=2, help="of the machine, and loader CPUs")
    parser.add_argument("--object-store-mib", type=int, default=512)
    parser.add_argument(
        "--block-kib", type=int, default=StreamConfig.target_block_bytes >> 10, help="of the stream"
    )
    parser.add_argument("--steady-rounds", type=int, default=3, help="of the stream")
    parser.add_argument(
        "--against", metavar="PATH", help="a checkout of an older miles, measured in turn"
    )
    parser.add_argument("--peer-rows", type=int, default=16_418)
    parser.add_argument(
        "--hold-seconds", type=float, default=0.1, help="how long a slow consumer keeps a step"
    )
    parser.add_argument("--slow-steps", type=int, default=256)
    parser.add_argument("--slow-window", type=int, default=8_192)
    parser.add_argument(
        "--growth-rows",
        type=int,
        default=32_768,
        help="of the small set; many against the rows that the stream has under way at a time",
    )
    parser.add_argument("--growth", type=int, default=12, help="the large set in small ones")
    parser.add_argument(
        "--growth-hold-seconds", type=float, default=0.02, help="how long a consumer keeps a step"
    )
    parser.add_argument("--growth-window", type=int, default=4_096)
    parser.add_argument("--feed-rounds", type=int, default=10, help="of blocks handed out")
    parser.add_argument("--rounds", type=int, default=5, help="of first steps, whose median counts")
    parser.add_argument(
        "--json", metavar="FILE", help="write the numbers here; '-': to the standard output"
    )
    add_check_flag(parser)
    parser.add_argument(
        "--max-outside", type=float, default=16.0, help="CPU us a row outside normalize and encode"
    )
    parser.add_argument(
        "--min-gain", type=float, default=2.5, help="rows a CPU second against the older miles"
    )
    parser.add_argument("--min-peer-ratio", type=float, help="end to end; no bar by default")
    parser.add_argument("--max-wait", type=float, default=0.01, help="of a slow consumer's time")
    parser.add_argument("--max-resume", type=float, default=1.5)
    parser.add_argument("--max-growth-time", type=float, default=1.5)
    parser.add_argument("--max-growth-memory", type=float, default=1.3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
