"""The CPU time of a loader's process, by part: the child process of `pack.py`.

    python benchmarks/_loader_costs.py SETTINGS      a round for each line of standard input

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

_SCHEMAS = ((RAW_STEP, "table of rows"), (ENCODED_STEP, "table of samples"), (PACKED_STEP, "block"))


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
    parts.time_attribute(stages, "encode_steps", "encode_steps")
    parts.time_attribute(stages, "pack_steps", "the rest of packing")

    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
    print("ready", flush=True)
    for _ in sys.stdin:
        parts.seconds.clear()
        known = sum(
            _window(plan, ref, manifest, formats, encoder, parts, config) for ref in plan.windows(0)
        )
        print(json.dumps({"rows": known, "parts": parts.seconds}), flush=True)


def _window(
    plan: Any, ref: Any, manifest: Any, formats: Any, encoder: Any, parts: _Parts, config: Any
) -> int:
    """Run the chain on a window, and return its rows."""
    num_rows = 0
    take = parts.timed(lambda *_: "the rest of reading", next)
    raw_tables = stages.read_window(manifest, plan, ref, 0)
    while (raw := take(raw_tables, None)) is not None:
        packed = stages.pack_steps(stages.encode_steps(raw, formats, encoder), config.pack)
        num_rows += int(sum(packed["num_rows"].to_pylist()))
        for stage in ("normalize", "encode"):
            parts.seconds[stage] += sum(packed[f"{stage}_seconds"].to_pylist())
    return num_rows


if __name__ == "__main__":
    main()
