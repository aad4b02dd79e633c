"""Every row of a data set, read once: counted, judged, and written as messages where that is asked.

    few rows     this process reads and encodes them: sooner than Ray has started
    many rows    loaders do, through Ray

Both give the same counts and the same files. This process counts, keeps the ledger, and puts the
files where they belong.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace

import numpy as np
import pyarrow as pa

from miles.common import run_folder, storage
from miles.common.local_cpus import local_cpus
from miles.common.progress import progress
from miles.data.config import DataConfig, StreamConfig
from miles.data.files.manifest import Manifest
from miles.data.notebook.card import Summary
from miles.data.notebook.parts import PartFiles
from miles.data.rows import message_parts
from miles.data.stream import account, prepared
from miles.data.stream.ledger import Ledger
from miles.data.stream.reject_limits import RejectLimits
from miles.data.types import StepRows

RAY_ROWS = 100_000
"""Fewer rows are read by this process alone."""
OBJECT_STORE_BYTES = 512 << 20


def read_every_row(
    manifest: Manifest,
    config: DataConfig,
    url: str | None,
    parts: PartFiles | None,
    loader_cpus: int | None,
) -> tuple[Ledger, Summary]:
    """Read every row once, in the order of the files.

    Args:
        manifest: of the rows.
        config: of their stream.
        url: where rejects.jsonl is written, if anywhere.
        parts: where the messages are written, if anywhere.
        loader_cpus: that read and encode; None: all that there are.

    Raises:
        MilesError: a source that fails, too many rejected rows, or a folder that cannot be written.
    """
    ledger = Ledger(
        manifest,
        storage.join(url, run_folder.REJECTS) if url else None,
        RejectLimits.of(config),
    )
    lengths = [np.zeros(0, np.int32)]
    num_trained_tokens = 0

    num_tokens = 0
    working = progress(
        "reading rows" if parts is None else "reading and writing rows",
        total=manifest.num_rows,
        total_bytes=num_bytes_of(manifest),
    )
    with working as bar, closing(_steps(manifest, config, loader_cpus)) as steps:
        for row in steps:
            values = row.drop_columns(["part"]).to_pylist()[0]
            read = StepRows.from_columns(values)
            ledger.commit(values["step"], read)

            lengths.append(np.array(values["sample_lengths"], np.int32))
            num_trained_tokens += sum(values["sample_trained_tokens"])
            num_tokens += sum(values["sample_lengths"])
            bar.advance(read.num_read)
            bar.note(f"{num_tokens:,} tokens")
            part = row["part"][0]
            if parts and part.is_valid:
                parts.add(part.as_py())

    ledger.judge()
    ledger.require_written()
    if parts:
        ledger.require_trained()
    return ledger, Summary(
        ledger.num_read,
        np.concatenate(lengths).astype(np.int64),
        num_trained_tokens,
        account.reasons_of(account.total(ledger.totals().values())),
        ledger.unused_keys(),
    )


def num_bytes_of(manifest: Manifest) -> int:
    """Return the size of all files of a data set."""
    return sum(file.size_bytes for source in manifest.sources for file in source.files)


def on_ray(config: DataConfig, loader_cpus: int | None) -> DataConfig:
    """Return the settings of a stream on Ray, which is joined, or else started.

    Raises:
        ClusterError: it cannot be.
        NoRoomError: it has fewer CPUs than are asked for.
    """
    from miles.common import local_ray  # Ray: it takes seconds
    from miles.data.stream import ray_cpus

    with progress("starting Ray"):
        local_ray.connect(loader_cpus or local_cpus(), OBJECT_STORE_BYTES)
    config = replace(config, stream=StreamConfig(loader_cpus or ray_cpus.num_cpus()))
    ray_cpus.require_loader_cpus(config)
    return config


def _steps(
    manifest: Manifest, config: DataConfig, loader_cpus: int | None
) -> Generator[pa.Table, None, None]:
    """Yield the steps as PARTS_STEP, a table each: made here, or by loaders on Ray."""
    if manifest.num_rows < RAY_ROWS or loader_cpus == 1:
        yield from prepared.local_parts(manifest, config, message_parts.LIMITS)
        return

    from miles.data.stream import prepare_tasks

    config = on_ray(config, loader_cpus)
    yield from prepare_tasks.parts_on_ray(manifest, config, message_parts.LIMITS)
