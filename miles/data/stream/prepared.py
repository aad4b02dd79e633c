"""The stages of `prepare` over a window of rows: read, encode, and make Parquet files of messages.

    window  ->  PREPARED_STEP  1000 rows   1000 rows   …            1000 rows
            ->  PARTS_STEP     counts      counts      …            counts, and a file of 20,000 rows

A file holds rows of one window alone, and windows depend on the files of the data set alone. So the
files are the same, whether this process makes them or loaders do, and however many. Their names are
given by who keeps them, in the order of the windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa

from miles.common.garbage import collecting_rarely
from miles.data.config import DataConfig
from miles.data.encoding.encoder import Encoder
from miles.data.files.manifest import Manifest
from miles.data.order.plan import Plan, WindowRef
from miles.data.rows.message_parts import PartLimits, PartMaker
from miles.data.step_schemas import MESSAGES, PARTS_STEP
from miles.data.stream import stages


def prepared_steps(
    manifest: Manifest, plan: Plan, ref: WindowRef, encoder: Encoder
) -> Iterator[pa.Table]:
    """Yield the steps of a window as PREPARED_STEP."""
    for raw in stages.read_window(manifest, plan, ref, 0):
        yield stages.prepare_steps(raw, manifest, encoder)


def with_parts(steps: Iterable[pa.Table], limits: PartLimits) -> Iterator[pa.Table]:
    """Turn the steps of a window, PREPARED_STEP, into PARTS_STEP: a table each.

    A step is yielded when the next one has come: the last one ends a file, full or not.
    """
    maker = PartMaker(limits)
    before: pa.Table | None = None
    for step in stages.each_step(steps):
        if before is not None:
            yield _with_part(before, maker.finish() if maker.is_full else None)
        maker.add(rows_of(step))
        before = step
    if before is not None:
        yield _with_part(before, maker.finish())


def rows_of(table: pa.Table) -> pa.Table:
    """Return the rows of PREPARED_STEP, step after step: a table of `MESSAGES`."""
    rows = table["rows"].combine_chunks().flatten()
    return pa.Table.from_arrays(rows.flatten(), schema=MESSAGES)


def local_parts(manifest: Manifest, config: DataConfig, limits: PartLimits) -> Iterator[pa.Table]:
    """Yield the steps of a data set, PARTS_STEP, made in this process without Ray."""
    plan = stages.make_plan(manifest, config)
    encoder = stages.encoder_of(config.encode)
    with collecting_rarely():
        for ref in plan.windows(0):
            yield from with_parts(prepared_steps(manifest, plan, ref, encoder), limits)


def _with_part(step: pa.Table, part: bytes | None) -> pa.Table:
    """Return a step with the file that ends with it, if one does, in place of its rows."""
    column = pa.array([part], PARTS_STEP.field("part").type)
    return step.drop_columns(["rows"]).append_column("part", column).select(PARTS_STEP.names)
