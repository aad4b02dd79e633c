"""`prepare` on Ray: a task for each window, whose steps and files come in the order of the windows.

    windows   0 1 2 | 3 4 5 …      as many run as there are loaders, and one waits
    yielded   0: a file, a file;  1: a file;  …

A task stops where it is some files ahead of what was taken, and keeps its processor. A first window
whose process died needs one to begin again: so where it has given nothing for a while, a file of
each other window is taken and kept, until one of these ends.

It is Ray's core alone. Ray Data would bring two actors and its own libraries into every loader,
half a gigabyte, for what is needed nowhere here: blocks that it cuts, and stages between them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import ray

from miles.data.config import DataConfig
from miles.data.files.manifest import Manifest
from miles.data.order.plan import WindowRef
from miles.data.rows.message_parts import PartLimits
from miles.data.stream import loader_process, prepared, stages
from miles.data.stream.carried_encoder import CarriedEncoder

_AHEAD = 2
"""Tables that a task makes before one of them is taken."""
_PATIENCE_SECONDS = 10.0
"""The time without a table of the first window after which one of each other window is taken."""


@dataclass(frozen=True)
class _Shared:
    """The arguments that all tasks have in common."""

    plan: Any
    """a reference to the manifest and the plan"""
    encoder: CarriedEncoder
    limits: PartLimits


@dataclass(eq=False)
class _Window:
    """A window that is being prepared."""

    tables: Any
    """the generator of references that its task returned"""
    taken: deque[Any] = field(default_factory=deque)
    """references that were taken before their turn"""

    def take(self, timeout: float) -> bool:
        """Take the next table within some seconds. Return whether there was one, or the end."""
        ready, _ = ray.wait([self.tables], timeout=timeout, fetch_local=False)
        if ready:
            self.taken.extend(islice(self.tables, 1))
        return bool(ready)


def parts_on_ray(
    manifest: Manifest, config: DataConfig, limits: PartLimits
) -> Generator[pa.Table, None, None]:
    """Yield the steps of a data set, PARTS_STEP, as `prepared.local_parts` does, made by loaders.

    Ray must be initialised. Tasks that run are cancelled where it is closed.

    Raises:
        MilesError: a task raised it, or failed after its retries.
    """
    plan = stages.make_plan(manifest, config)
    shared = _Shared(ray.put((manifest, plan)), CarriedEncoder.put(config.encode), limits)
    task = ray.remote(
        num_cpus=1,
        num_returns="streaming",
        max_retries=config.stream.max_retries,
        scheduling_strategy="SPREAD",
        _generator_backpressure_num_objects=_AHEAD,
    )(_tables_of_window)
    windows = iter(plan.windows(0))
    running: deque[_Window] = deque()

    try:
        for ref in islice(windows, config.stream.loader_cpus + 1):
            running.append(_Window(task.remote(shared, ref)))
        while running:
            yield from stages.each_step(map(ray.get, _of_first(running)))
            running.popleft()
            for ref in islice(windows, 1):
                running.append(_Window(task.remote(shared, ref)))
    except Exception as error:
        raise loader_process.cause_of(error, "preparing failed") from error
    finally:
        for window in running:
            ray.cancel(window.tables)


def _of_first(running: Sequence[_Window]) -> Iterator[Any]:
    """Yield the references to the tables of the first window, in order."""
    first = running[0]
    while True:
        is_there = bool(first.taken) or first.take(_PATIENCE_SECONDS)
        if first.taken:
            yield first.taken.popleft()
        elif is_there:
            return  # the window's end
        else:
            for other in islice(running, 1, None):
                other.take(timeout=0)


def _tables_of_window(shared: _Shared, ref: WindowRef) -> Iterator[pa.Table]:
    """Yield the steps of a window in this process, PARTS_STEP: a table for each file."""
    loader_process.collect_rarely()
    try:
        yield from _joined(_steps_of_window(shared, ref))
    except Exception as error:
        subject = f"preparing failed in steps {ref.first_step} to {ref.last_step}"
        raise loader_process.failure(error, subject) from error


def _steps_of_window(shared: _Shared, ref: WindowRef) -> Iterator[pa.Table]:
    shared.encoder.rebuild()
    encoder = stages.encoder_of(shared.encoder.config)
    manifest, plan = loader_process.manifest_and_plan(shared.plan)
    return prepared.with_parts(prepared.prepared_steps(manifest, plan, ref, encoder), shared.limits)


def _joined(steps: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield the steps up to each one that ends a file, as a table."""
    waiting = []
    for step in steps:
        waiting.append(step)
        if step["part"][0].is_valid:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()
