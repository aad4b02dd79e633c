"""The CPU time of a loader, by part, for each table that it makes.

    Read    [MeteredRead: read]  -> Encode [encode: normalize, encode, tables] -> [MeteredPack: pack]
    -> Ray builds blocks, and takes them away [ray]

The stages are the stream's own, with a clock around them. It is the process's CPU time, so that
what others do on the machine does not count. Encode has no place for a clock: it is what lies
between Read and Pack, and is shared out by the times that it writes into its table.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from miles.data.config import PackConfig
from miles.data.stream import pipeline

PARTS = ("read", "normalize", "encode", "tables", "pack", "ray")
"""Of a loader. "tables": what Encode does beside normalizing and encoding; "ray": the process's
time outside the stages."""


def metered_loader(folder: str) -> pipeline.LoaderStages:
    """Return the loader's stages with clocks; each process writes into a file of the folder."""
    return pipeline.LoaderStages(partial(MeteredRead, folder), partial(MeteredPack, folder))


class MeteredRead(pipeline.Read):
    """Reads as ever, and notes the CPU time."""

    def __init__(self, folder: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._folder = folder

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Read the windows of a table."""
        tables = super().__call__(table)
        while True:
            started = time.process_time()
            raw = next(tables, None)
            _Clock.read_seconds += time.process_time() - started
            if raw is None:
                return
            _Clock.encode_began = (time.process_time(), time.perf_counter())
            yield raw


class MeteredPack(pipeline.Pack):
    """Packs as ever, and writes a line with the CPU times of the table."""

    def __init__(self, folder: str, config: PackConfig) -> None:
        super().__init__(config)
        self._folder = folder

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Pack the samples of a table."""
        began = time.process_time()
        began_cpu, began_wall = _Clock.encode_began
        encode_cpu = began - began_cpu
        encode_wall = time.perf_counter() - began_wall
        (packed,) = super().__call__(table)

        # A preempted process loses wall time anywhere: the shares of it hold for CPU time.
        shares = {
            name: min(_sum(table, f"{name}_seconds") / encode_wall, 1.0)
            for name in ("normalize", "encode")
        }
        now = time.process_time()
        line = {
            "at": now,
            "rows": _sum(table, "num_rows"),
            "read": _Clock.read_seconds,
            "normalize": encode_cpu * shares["normalize"],
            "encode": encode_cpu * shares["encode"],
            "tables": encode_cpu * (1 - shares["normalize"] - shares["encode"]),
            "pack": now - began,
        }
        _Clock.read_seconds = 0.0
        with open(Path(self._folder, f"{os.getpid()}.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        yield packed


class _Clock:
    """This process's times, from one stage to the next."""

    read_seconds = 0.0
    encode_began = (0.0, 0.0)


def _sum(table: pa.Table, name: str) -> float:
    return float(pc.sum(table[name]).as_py())


def loader_costs(folder: str) -> dict[str, float]:
    """Return the microseconds a row of each of `PARTS`, over all processes.

    The first table of each process is not counted: with it, the tokenizer is certified.
    """
    seconds: Counter[str] = Counter()
    whole = rows = 0.0
    for file in Path(folder).iterdir():
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for line in lines[1:]:
            seconds.update({part: line[part] for part in PARTS if part != "ray"})
        whole += lines[-1]["at"] - lines[0]["at"]
        rows += sum(line["rows"] for line in lines[1:])
    seconds["ray"] = whole - seconds.total()
    return {part: seconds[part] / rows * 1e6 for part in PARTS}
