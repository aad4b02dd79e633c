"""The stages composed, in order, as a Ray Data stream of which every row is one step.

    from_items(windows) -> [read_window -> encode -> pack]        (see README.md in this folder)

Ray Data cuts blocks where it likes, so a step is one row, which cannot be cut. The stages run one behind the other in
one task a window; blocks of some steps leave it while it runs. The order is that of the windows (`preserve_order`),
whatever finishes first.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Dataset

from miles.common.redact import redact
from miles.data.config import DataConfig, EncodeConfig, PackConfig, RowFormat
from miles.data.files.manifest import Manifest
from miles.data.order.plan import Plan, WindowRef
from miles.data.stream import stages
from miles.errors import ClusterError, MilesError, NoRoomError

Gate = Callable[[int], None]
"""Returns when the window that begins with a step may be loaded."""


class _Read:
    """Windows -> RAW_STEP. The manifest is fetched from the object store once a process."""

    def __init__(self, plan: Any, start_row: int, gate: Gate | None) -> None:
        self.plan, self.start_row, self.gate = plan, start_row, gate

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        manifest, plan = _fetch(self.plan)
        for row in table.to_pylist():
            ref = WindowRef(**row)
            if self.gate is not None:
                self.gate(ref.first_step)
            yield from stages.read_window(manifest, plan, ref, self.start_row)


class _Encode:
    """RAW_STEP -> ENCODED_STEP. The encoder is certified once a process."""

    def __init__(self, config: DataConfig, formats: list[RowFormat]) -> None:
        self.config, self.formats = config, formats

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        encoder, config = stages.encoder_of(self.config.encode), self.config
        yield stages.encode_steps(
            table, self.formats, encoder, config.held_out_fraction, config.held_out
        )


class _Pack:
    """ENCODED_STEP -> PACKED_STEP."""

    def __init__(self, config: PackConfig) -> None:
        self.config = config

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        yield stages.pack_steps(table, self.config)


class _Prepare:
    """RAW_STEP -> PREPARED_STEP."""

    def __init__(self, config: EncodeConfig, formats: list[RowFormat]) -> None:
        self.config, self.formats = config, formats

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        yield stages.prepare_steps(table, self.formats, stages.encoder_of(self.config))


Stage = Callable[[pa.Table], Iterator[pa.Table]]


class _Chain:
    """Stages one behind the other. As maps of their own Ray would fuse them, too, but build blocks between them."""

    def __init__(self, *chained: Stage) -> None:
        self.chained = chained

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        _collect_rarely()
        return _run(table, self.chained)


def _run(table: pa.Table, chained: tuple[Stage, ...]) -> Iterator[pa.Table]:
    if not chained:
        yield table
        return
    for made in chained[0](table):
        yield from _run(made, chained[1:])


@cache
def _collect_rarely() -> None:
    """Once a process: rows become many small objects that refer to one another in no circle. Looking for circles among
    them, and among what the tokenizer keeps, takes a tenth of a loader's time."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


_fetched: dict[Any, tuple[Manifest, Plan]] = {}


def _fetch(reference: Any) -> tuple[Manifest, Plan]:
    if reference not in _fetched:
        _fetched.clear()
        _fetched[reference] = ray.get(reference)
    return _fetched[reference]


def require_loader_cpus(config: DataConfig) -> None:
    """Refuses a cluster too small for the loader: Ray Data would wait for its CPUs for ever, and say nothing.

    Raises:
        NoRoomError: what there is, and what is needed.
    """
    cpus = ray.cluster_resources().get("CPU", 0)
    if cpus < config.stream.loader_cpus:
        raise NoRoomError(
            f"Ray has {cpus:g} CPUs; --loader-cpus {config.stream.loader_cpus} needs as many or more"
        )


def warm_up(config: DataConfig) -> None:
    """Starts the loader's processes, each of which certifies the tokenizer, beside whatever else is starting. The
    stream's tasks find them idle; without them, the first step would wait for all that one after the other."""
    task = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(_warm_up)
    for _ in range(config.stream.loader_cpus):
        task.remote(config.encode)


def _warm_up(config: EncodeConfig) -> None:
    stages.encoder_of(config)


def build(
    manifest: Manifest, config: DataConfig, start_row: int = 0, gate: Gate | None = None
) -> Dataset:
    """The stream from `start_row` consumed rows to the last epoch's end: PACKED_STEP rows, in order.

    Nothing runs until it is iterated. Ray must be initialised.

    Args:
        gate: called in a loader's process before a window is read; without it, windows are loaded ahead of their use
            until the share of the object store is full that Ray Data allows itself.
    """
    encode = _Encode(config, stages.source_formats(manifest))
    return _compose(manifest, config, start_row, gate, encode, _Pack(config.pack))


def build_prepared(manifest: Manifest, config: DataConfig) -> Dataset:
    """PREPARED_STEP rows, in file order: conversations with their token counts."""
    return _compose(
        manifest, config, 0, None, _Prepare(config.encode, stages.source_formats(manifest))
    )


def _compose(
    manifest: Manifest, config: DataConfig, start_row: int, gate: Gate | None, *further: Stage
) -> Dataset:
    plan = stages.make_plan(manifest, config)
    windows = [asdict(ref) for ref in plan.windows(start_row)]
    before = DataContext.get_current()
    context = before.copy()
    context.target_max_block_size = config.stream.target_block_bytes
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        cpu=config.stream.loader_cpus
    )
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(
        logging.ERROR
    )  # it reports each start and end; failures are raised
    DataContext._set_current(context)  # a data set keeps the context that it was made in
    try:
        dataset = ray.data.from_items(
            windows, override_num_blocks=max(len(windows), 1)
        )  # none at the end
        chain = _Chain(_Read(ray.put((manifest, plan)), start_row, gate), *further)
        with warnings.catch_warnings():
            # Ray 2.60 deprecates the only way to give a task `max_retries`, without which a row that kills its worker
            # is tried for ever.
            warnings.simplefilter("ignore")
            dataset = dataset.map_batches(
                chain.__call__,
                batch_size=None,
                batch_format="pyarrow",
                ray_remote_args_fn=partial(dict, max_retries=config.stream.max_retries),
            )
    finally:
        DataContext._set_current(before)
    return dataset


def iterate(dataset: Dataset) -> Iterator[pa.Table]:
    """The steps of a stream as they are ready, each a table of one row; raises as `blocks` does."""
    for table in blocks(dataset):
        for index in range(table.num_rows):
            yield table.slice(index, 1)


def blocks(dataset: Dataset) -> Iterator[pa.Table]:
    """The steps of a stream as they are ready: tables of as many rows, which are steps, as Ray Data put together.

    Raises:
        MilesError: what a stage raised in its task, or that the stream failed after its retries.
    """
    try:
        # Ray 2.60 hands a block out only when it has the next `prefetch_batches` ones. What is ready is given at once;
        # that blocks are made ahead, Ray's executor sees to, and that steps are held ready, the feed.
        for table in dataset.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        ):
            if table.num_rows:
                yield table
    except (
        Exception
    ) as error:  # a task's error arrives wrapped, differently from release to release
        raise cause_of(error) from error


def cause_of(error: BaseException) -> MilesError:
    """The error of ours inside what Ray made of it; a `ClusterError` where there is none."""
    seen: BaseException | None = error
    while seen is not None:
        cause = getattr(seen, "cause", None)
        for candidate in (cause, seen):
            if (
                isinstance(candidate, MilesError)
                and type(candidate).__module__ == MilesError.__module__
            ):
                return candidate
        seen = cause if isinstance(cause, BaseException) else seen.__cause__
    return ClusterError(f"the data stream failed: {type(error).__name__}: {redact(str(error))}")
