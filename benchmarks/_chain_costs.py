"""The CPU time of a loader's process, by part: the child process of `pack.py`.

    python benchmarks/_chain_costs.py SETTINGS      a round for each line of standard input

Runs the chain of a loader without Ray, with whichever `miles` the import path has: so that
`pack.py` compares two checkouts, in turn. Only names are used that older checkouts have, too.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from miles.data.config import DataConfig, EncodeConfig, OrderConfig, PackConfig, SourceConfig
from miles.data.files.manifest import build_manifest
from miles.data.order.plan import Plan
from miles.data.step_schemas import ENCODED_STEP, PACKED_STEP, RAW_STEP
from miles.data.stream import row_outcomes, stages

READING = "the rest of reading"
OUTCOMES = "the rest of encoding"
PACKING = "the rest of packing"
_SCHEMAS = (
    (RAW_STEP, "table of rows"),
    (ENCODED_STEP, "table of samples"),
    (PACKED_STEP, "table of segments"),
)


class _CpuClock:
    """Stands in for `time` in the stages, so that what they report as seconds is CPU time."""

    perf_counter = staticmethod(time.process_time)


class _Parts:
    """CPU seconds by part. A part inside another is not counted in that one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def timed(self, name: Callable[..., str], work: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed; `name` gives the part from its arguments."""

        @functools.wraps(work)
        def call(*arguments: Any) -> Any:
            started = time.process_time()
            self._inner.append(0.0)
            result = work(*arguments)
            spent = time.process_time() - started
            self.seconds[name(*arguments)] += spent - self._inner.pop()
            self._inner[-1] += spent
            return result

        return call

    def time_attribute(self, owner: Any, attribute: str, name: Callable[..., str] | str) -> None:
        """Time a function where it stands, if it does."""
        namer = name if callable(name) else lambda *_: name
        if hasattr(owner, attribute):
            setattr(owner, attribute, self.timed(namer, getattr(owner, attribute)))


def _table_name(schema: Any, _: Any) -> str:
    """Return the part that a step table belongs to."""
    return next((name for known, name in _SCHEMAS if schema is known), "other tables")


def main() -> None:
    settings = json.loads(sys.argv[1])
    config = DataConfig(
        sources=(SourceConfig("rows", tuple(settings["paths"])),),
        order=OrderConfig(
            batch_size=settings["batch_size"], shuffle=True, window_rows=settings["window_rows"]
        ),
        encode=EncodeConfig(settings["tokenizer"]),
        pack=PackConfig(dp_size=settings["dp_size"]),
    )
    manifest = build_manifest(config.sources)
    plan = stages.make_plan(manifest, config)
    encoder = stages.encoder_of(config.encode)
    formats = stages.source_formats(manifest)

    parts = _Parts()
    for module in (stages, row_outcomes):
        module.time = _CpuClock  # type: ignore[attr-defined]
    parts.time_attribute(Plan, "window_steps", "plan")
    parts.time_attribute(stages, "step_table", _table_name)
    parts.time_attribute(stages, "_fingerprint", "fingerprint")
    parts.time_attribute(stages, "pack", "pack")
    parts.time_attribute(stages, "pack_stats", "pack")
    parts.time_attribute(stages, "encode_steps", OUTCOMES)
    parts.time_attribute(stages, "pack_steps", PACKING)

    gc.freeze()  # as the loader does it
    gc.set_threshold(100_000, 20, 50)
    print("ready", flush=True)
    take = parts.timed(lambda *_: READING, next)
    for _ in sys.stdin:
        parts.seconds.clear()
        num_rows = 0
        for ref in plan.windows(0):
            raw_tables = stages.read_window(manifest, plan, ref, 0)
            while (raw := take(raw_tables, None)) is not None:
                packed = stages.pack_steps(stages.encode_steps(raw, formats, encoder), config.pack)
                num_rows += sum(packed["num_rows"].to_pylist())
                _split_encoding(packed, parts.seconds)
        print(json.dumps({"rows": num_rows, "seconds": parts.seconds}), flush=True)


def _split_encoding(packed: Any, seconds: dict[str, float]) -> None:
    """Take from the time of `encode_steps` what the stages' own columns say of it."""
    for stage in ("normalize", "encode"):
        spent = sum(packed[f"{stage}_seconds"].to_pylist())
        seconds[stage] += spent
        seconds[OUTCOMES] -= spent


if __name__ == "__main__":
    main()
