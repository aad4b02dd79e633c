"""The stages as a Ray Data stream: one task a window, one row a step.

    from_items(windows) -> [Read -> Encode -> Pack]        (see miles/data/README.md)

Ray Data cuts blocks where it likes, so a step is one row, which cannot be cut. All stages of a
window run in one task; blocks of some steps leave it while it runs. The steps come in the order of
the windows (`preserve_order`), whichever task finishes first.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray

from miles.common import small_ray_data
from miles.data.config import DataConfig, EncodeConfig, PackConfig, RowFormat
from miles.data.files.manifest import Manifest
from miles.data.order.plan import WindowRef
from miles.data.stream import loader_process, prepared, stages
from miles.data.stream.carried_encoder import CarriedEncoder
from miles.data.stream.ray_cpus import require_loader_cpus as require_loader_cpus
from miles.errors import MilesError

if TYPE_CHECKING:
    from ray.data import Dataset

Gate = Callable[[int], None]
"""Returns when the window that begins with a step may be loaded."""

Stage = Callable[[pa.Table], Iterator[pa.Table]]
"""A step table in, step tables out."""


class Read:
    """Windows -> RAW_STEP. The manifest is fetched from the object store once a process."""

    def __init__(self, plan: Any, start_row: int, gate: Gate | None) -> None:
        self.plan = plan
        self.start_row = start_row
        self.gate = gate

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Read the windows of a table, each when the gate lets it."""
        manifest, plan = loader_process.manifest_and_plan(self.plan)
        for row in table.to_pylist():
            ref = WindowRef(**row)
            if self.gate is not None:
                self.gate(ref.first_step)
            yield from stages.read_window(manifest, plan, ref, self.start_row)


class Encode:
    """RAW_STEP -> ENCODED_STEP. The encoder is made once a process."""

    def __init__(self, config: DataConfig, formats: list[RowFormat]) -> None:
        self.config = config
        self.formats = formats

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Encode the rows of a table."""
        config = self.config
        encoder = stages.encoder_of(config.encode)
        yield stages.encode_steps(
            table, self.formats, encoder, config.held_out_fraction, config.held_out
        )


class Pack:
    """ENCODED_STEP -> PACKED_STEP."""

    def __init__(self, config: PackConfig) -> None:
        self.config = config

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Pack the samples of a table."""
        yield stages.pack_steps(table, self.config)


class Messages:
    """Windows -> tables of `MESSAGES`, a row for each conversation."""

    def __init__(self, plan: Any, config: EncodeConfig) -> None:
        self.plan = plan
        self.config = config

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Prepare the windows of a table."""
        manifest, plan = loader_process.manifest_and_plan(self.plan)
        encoder = stages.encoder_of(self.config)
        for row in table.to_pylist():
            steps = prepared.prepared_steps(manifest, plan, WindowRef(**row), encoder)
            yield from map(prepared.rows_of, steps)


@dataclass(frozen=True)
class LoaderStages:
    """The makers of a loader's stages: where a test puts in a stage that is slow, or fails."""

    read: Callable[[Any, int, Gate | None], Stage] = Read
    pack: Callable[[PackConfig], Stage] = Pack


LOADER = LoaderStages()


class _Chain:
    """Stages in a row. Ray would fuse maps of their own, too, but build blocks between them."""

    def __init__(self, *chained: Stage) -> None:
        self.chained = chained
        self.encoder: CarriedEncoder | None = None
        """rebuilt in the loader's process before its first stage"""

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        loader_process.collect_rarely()
        return _judged(self._tables(table), table)

    def _tables(self, table: pa.Table) -> Iterator[pa.Table]:
        if self.encoder is not None:
            self.encoder.rebuild()
        yield from _run(table, self.chained)


def _judged(tables: Iterator[pa.Table], windows: pa.Table) -> Iterator[pa.Table]:
    """Pass on the tables of a chain, and say what an error in it means for the run.

    Args:
        windows: `WindowRef` rows that the tables are made of.
    """
    try:
        yield from tables
    except Exception as error:
        first, last = windows["first_step"][0], windows["last_step"][-1]
        subject = f"the data stream failed in steps {first} to {last}"
        raise loader_process.failure(error, subject) from error


def _run(table: pa.Table, chained: tuple[Stage, ...]) -> Iterator[pa.Table]:
    """Pass a table through stages, each of which may give several for one."""
    if not chained:
        yield table
        return
    for result in chained[0](table):
        yield from _run(result, chained[1:])


def warm_up(config: DataConfig, encoder: CarriedEncoder) -> None:
    """Start the loader's processes, and let each rebuild the encoder, while other things start.

    The stream's tasks find these processes idle. Without them, the first step would wait for their
    start.
    """
    task = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(_warm_up)
    for _ in range(config.stream.loader_cpus):
        task.remote(encoder)


def _warm_up(encoder: CarriedEncoder) -> None:
    """Make the encoder in this process."""
    encoder.rebuild()


def build(
    manifest: Manifest,
    config: DataConfig,
    start_row: int = 0,
    gate: Gate | None = None,
    loader: LoaderStages = LOADER,
    encoder: CarriedEncoder | None = None,
) -> Dataset:
    """Return the stream from `start_row` consumed rows to the last epoch's end: PACKED_STEP rows.

    Nothing runs until it is iterated. Ray must be initialised.

    Args:
        manifest: of the config's sources.
        config: of the stream.
        start_row: rows consumed before.
        gate: called in a loader's process before a window is read. Without it, windows are loaded
            ahead of their use until the share of the object store is full that Ray Data allows
            itself.
        loader: the stages of the loader.
        encoder: of the config's settings; None: this process makes it.
    """
    encode = Encode(config, stages.source_formats(manifest))
    plan = stages.make_plan(manifest, config)
    read = loader.read(ray.put((manifest, plan)), start_row, gate)
    chain = _Chain(read, encode, loader.pack(config.pack))
    return _over_windows(plan.windows(start_row), chain, config, encoder)


def build_messages(manifest: Manifest, config: DataConfig) -> Dataset:
    """Return rows with the columns of `MESSAGES`, in file order."""
    plan = stages.make_plan(manifest, config)
    chain = _Chain(Messages(ray.put((manifest, plan)), config.encode))
    return _over_windows(plan.windows(0), chain, config)


def _over_windows(
    refs: Iterable[WindowRef],
    chain: _Chain,
    config: DataConfig,
    encoder: CarriedEncoder | None = None,
) -> Dataset:
    """Return the data set that runs a chain of stages over windows, a task a window, in order."""
    # The driver hands data sets to others: it does without Ray Data, which takes half a second.
    import ray.data
    from ray.data import DataContext

    small_ray_data.keep_actors_away()
    windows = [asdict(ref) for ref in refs]
    chain.encoder = encoder or CarriedEncoder.put(config.encode)

    # A copy of the context, so that no other data set of this process is changed.
    before = DataContext.get_current()
    context = before.copy()
    context.target_max_block_size = config.stream.target_block_bytes
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        cpu=config.stream.loader_cpus
    )
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # It reports each start and end, and prints the traceback of each failure; these are raised.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)

    DataContext._set_current(context)  # a data set keeps the context that it was made in
    try:
        # At the end of the data there is no window, and there must be a block.
        dataset = ray.data.from_items(windows, override_num_blocks=max(len(windows), 1))
        with warnings.catch_warnings():
            # Ray 2.60 deprecates the only way to give a task `max_retries`, without which a row
            # that kills its worker is tried for ever.
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
    """Yield the steps of a stream as they are ready, each a table of one row.

    Raises:
        MilesError: as `blocks` does.
    """
    yield from stages.each_step(blocks(dataset))


def blocks(dataset: Dataset) -> Iterator[pa.Table]:
    """Yield the steps of a stream as they are ready, in the tables that Ray Data puts together.

    Each row of a table is a step.

    Raises:
        MilesError: a stage raised it in its task, or the stream failed after its retries.
    """
    small_ray_data.keep_actors_away()
    try:
        # Not `iter_batches`: Ray 2.60 passes each block through more threads there, and may hold
        # one back until it has the next. Ray's executor makes blocks ahead; the feed holds steps ready.
        for bundle in dataset.iter_internal_ref_bundles():
            for reference in bundle.block_refs:
                table = ray.get(reference)
                if table.num_rows:
                    yield table
                del table, reference
            del bundle  # or its blocks would outlive the next wait
    except Exception as error:
        # A task's error arrives wrapped, differently from release to release.
        raise cause_of(error) from error


def cause_of(error: BaseException) -> MilesError:
    """Return what an error that came out of the stream means (`loader_process.cause_of`)."""
    return loader_process.cause_of(error, "the data stream failed")
