"""The pure functions over Arrow: one table row is one step, before and after each of them.

    read_window    which window   ->  RAW_STEP       rows as plain turns, or as JSON text
    encode_steps   RAW_STEP       ->  ENCODED_STEP   normalized, held-out rows left out, tokenised
    pack_steps     ENCODED_STEP   ->  PACKED_STEP    laid out rank by rank
    prepare_steps  RAW_STEP       ->  PREPARED_STEP  messages and token counts, for `prepare`

A table has some steps, of about `TABLE_ROWS` rows together, so that the cost of Arrow is paid once
for all of them. Which steps share a table changes nothing in them. `local_steps` composes the
functions in one process, without Ray: the definition that the stream is tested against.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from miles.common.offsets import offsets_of
from miles.data.config import DataConfig, EncodeConfig, PackConfig, RowFormat
from miles.data.encoding import kept_encoders
from miles.data.encoding.encoder import Encoder
from miles.data.files.manifest import Manifest
from miles.data.files.read import read_raw_rows
from miles.data.order.plan import Plan, PlannedStep, WindowRef
from miles.data.packing.pack import PackStats, pack, pack_stats
from miles.data.packing.shards import unpack
from miles.data.rows.messages_parquet import messages_table
from miles.data.step_schemas import ENCODED_STEP, PACKED_STEP, PREPARED_STEP, RAW_STEP
from miles.data.stream.row_outcomes import TableOutcome, table_outcome
from miles.data.stream.step_tables import (
    ListColumn,
    carried,
    count_by_source,
    list_counts,
    list_values,
    reordered,
    step_table,
)
from miles.data.types import (
    Conversation,
    Int32,
    Int64,
    Samples,
    Step,
    UInt8,
)

TABLE_ROWS = 1_024
"""Rows of the steps in one table, unless one step has more by itself."""


# --- read -----------------------------------------------------------------------------------------


def read_window(
    manifest: Manifest, plan: Plan, ref: WindowRef, consumed_rows: int
) -> Iterator[pa.Table]:
    """Yield the steps of a window that begin at `consumed_rows` or later, as RAW_STEP.

    A shuffled window is read before its first step. A window in file order is read as the steps
    come to its rows.
    """
    steps = [step for step in plan.window_steps(ref) if step.next_row > consumed_rows]
    if not steps:
        return

    started = time.perf_counter()
    groups = list(_groups(steps))
    group_ids = [np.concatenate([step.row_ids for step in group]) for group in groups]
    parts = read_raw_rows(manifest, np.concatenate(group_ids), list(map(len, group_ids)))
    window_seconds = (time.perf_counter() - started) / len(steps)

    for group, row_ids in zip(groups, group_ids, strict=True):
        started = time.perf_counter()
        counts = [len(step.row_ids) for step in group]
        rows = next(parts)
        step_seconds = window_seconds + (time.perf_counter() - started) / len(group)
        columns = {
            "step": [step.step for step in group],
            "epoch": [step.epoch for step in group],
            "next_row": [step.next_row for step in group],
            "num_rows": counts,
            "row_ids": ListColumn(row_ids, counts),
            "source_ids": ListColumn(manifest.source_of(row_ids), counts),
            "payloads": ListColumn(rows.payloads, counts),
            "turns": ListColumn(rows.turns, counts),
            "read_seconds": [step_seconds] * len(group),
        }
        yield step_table(RAW_STEP, columns)


def _groups(steps: Sequence[PlannedStep]) -> Iterator[Sequence[PlannedStep]]:
    """Yield steps that share a table. All steps but an epoch's last have as many rows."""
    size = max(TABLE_ROWS // len(steps[0].row_ids), 1)
    return (steps[begin : begin + size] for begin in range(0, len(steps), size))


# --- encode ---------------------------------------------------------------------------------------


def encode_steps(
    table: pa.Table,
    formats: Sequence[RowFormat],
    encoder: Encoder,
    held_out_fraction: float = 0.0,
    held_out: str = "leave_out",
) -> pa.Table:
    """Turn RAW_STEP into ENCODED_STEP.

    Args:
        table: RAW_STEP.
        formats: the row format of each source.
        encoder: of this process.
        held_out_fraction: rows whose `hash_share` is below are held out.
        held_out: as in `DataConfig`. Rows that are left out are neither encoded nor rejected.
    """
    outcome = table_outcome(table, formats, encoder, held_out_fraction, held_out)
    samples = outcome.samples
    sample_offsets = offsets_of(outcome.sample_counts)
    token_offsets = offsets_of(samples.lengths)[sample_offsets]
    num_straddling = offsets_of(samples.num_straddling_tokens)[sample_offsets]
    columns = {
        **carried(table, ENCODED_STEP),
        **_outcome_columns(table, outcome, len(formats)),
        "fingerprint": _fingerprints(samples, sample_offsets, token_offsets),
        "input_ids": ListColumn(samples.input_ids, np.diff(token_offsets)),
        "loss_mask": ListColumn(samples.loss_mask, np.diff(token_offsets)),
        "num_straddling_tokens": np.diff(num_straddling),
        "normalize_seconds": outcome.normalize_seconds,
        "encode_seconds": outcome.encode_seconds,
    }
    return step_table(ENCODED_STEP, columns)


def prepare_steps(table: pa.Table, manifest: Manifest, encoder: Encoder) -> pa.Table:
    """Turn RAW_STEP into PREPARED_STEP, with all rows.

    Args:
        table: RAW_STEP.
        manifest: of its rows.
        encoder: of this process.
    """
    formats = source_formats(manifest)
    row_ids, source_ids = list_values(table, "row_ids"), list_values(table, "source_ids")
    parts: list[pa.Table] = []

    def write(kept: Int64, conversations: Sequence[Conversation]) -> None:
        names = manifest.source_names
        parts.append(messages_table(row_ids[kept], source_ids[kept], names, conversations))

    outcome = table_outcome(table, formats, encoder, take_kept=write)
    rows = pa.concat_tables(parts).to_struct_array().combine_chunks()
    trained_before = offsets_of(outcome.samples.loss_mask)[offsets_of(outcome.samples.lengths)]
    columns = {
        **carried(table, PREPARED_STEP),
        **_outcome_columns(table, outcome, len(formats)),
        "sample_trained_tokens": ListColumn(np.diff(trained_before), outcome.sample_counts),
        "rows": ListColumn(rows, outcome.sample_counts),
    }
    return step_table(PREPARED_STEP, columns)


def _outcome_columns(table: pa.Table, outcome: TableOutcome, num_sources: int) -> dict[str, Any]:
    """Return the columns that ENCODED_STEP and PREPARED_STEP both have of a step's rows."""
    row_ids = list_values(table, "row_ids")
    row_sources = list_values(table, "source_ids")
    row_steps = np.repeat(np.arange(table.num_rows), table["num_rows"].to_numpy())
    kept = outcome.kept_rows
    counts = outcome.sample_counts

    def by_source(rows: Int64) -> ListColumn:
        return count_by_source(row_steps[rows], row_sources[rows], table.num_rows, num_sources)

    return {
        "source_rows": by_source(np.arange(len(row_ids))),
        "source_truncated": by_source(kept[outcome.samples.is_truncated]),
        "source_held_out": by_source(outcome.left_out_rows),
        "rejects": outcome.rejects,
        "unused_keys": outcome.unused_keys,
        "sample_row_ids": ListColumn(row_ids[kept], counts),
        "sample_source_ids": ListColumn(row_sources[kept], counts),
        "sample_lengths": ListColumn(outcome.samples.lengths, counts),
    }


def _fingerprints(samples: Samples, sample_offsets: Int64, token_offsets: Int64) -> list[str]:
    """Return a hash of each step's samples.

    Args:
        sample_offsets, token_offsets: int64 [steps + 1]: where each step begins, and the end.
    """
    fingerprints = []
    spans = zip(pairwise(sample_offsets.tolist()), pairwise(token_offsets.tolist()), strict=True)
    for (first_sample, last_sample), (first_token, last_token) in spans:
        lengths = samples.lengths[first_sample:last_sample]
        ids = samples.input_ids[first_token:last_token]
        fingerprints.append(_fingerprint(lengths, ids, samples.loss_mask[first_token:last_token]))
    return fingerprints


def _fingerprint(lengths: Int32, ids: Int32, mask: UInt8) -> str:
    """Return a hash of a step's samples, hex."""
    digest = xxhash.xxh64()
    for part in (lengths, ids, mask):
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


# --- pack -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PackedStep:
    """The packing of the samples of one step."""

    micro_batches: list[list[int]]
    """rank 0's micro-batches, rank 1's, …: the numbers of the step's samples in each"""
    stats: PackStats


def pack_steps(table: pa.Table, config: PackConfig) -> pa.Table:
    """Turn ENCODED_STEP into PACKED_STEP: the samples in the order of ranks and micro-batches."""
    started = time.perf_counter()
    lengths = list_values(table, "sample_lengths")
    counts = list_counts(table, "sample_lengths")
    packed = _pack_each(lengths, counts, config)

    columns = {
        **carried(table, PACKED_STEP),
        **_segment_columns(table, packed, lengths, counts),
        **_trained_columns(table, lengths, counts),
        "pack_fill": [step.stats.pack_fill for step in packed],
        "dp_imbalance": [step.stats.dp_imbalance for step in packed],
        "dp_size": [config.dp_size] * table.num_rows,
    }
    seconds = (time.perf_counter() - started) / table.num_rows
    columns["pack_seconds"] = [seconds] * table.num_rows
    return step_table(PACKED_STEP, columns)


def _pack_each(lengths: Int32, counts: Int64, config: PackConfig) -> list[_PackedStep]:
    """Pack each step's samples by themselves."""
    packed = []
    for begin, end in pairwise(offsets_of(counts)):
        step_lengths = lengths[begin:end]
        ranks = pack(step_lengths, config)
        stats = pack_stats(step_lengths, ranks, config)
        packed.append(_PackedStep(list(chain.from_iterable(ranks)), stats))
    return packed


def _segment_columns(
    table: pa.Table, packed: Sequence[_PackedStep], lengths: Int32, counts: Int64
) -> dict[str, Any]:
    """Return the columns of samples and tokens, in the order of ranks and micro-batches."""
    batches = list(chain.from_iterable(step.micro_batches for step in packed))
    num_batches = [len(step.micro_batches) for step in packed]
    batch_segments = np.fromiter(map(len, batches), np.int32, len(batches))

    # The table's samples in the order in which they are packed.
    sample_offsets = offsets_of(counts)
    order = np.fromiter(chain.from_iterable(batches), np.int64, len(lengths))
    order += np.repeat(sample_offsets[:-1], counts)

    num_tokens = np.diff(offsets_of(lengths)[sample_offsets])
    ids = reordered(list_values(table, "input_ids"), lengths, order)
    mask = reordered(list_values(table, "loss_mask"), lengths, order)
    return {
        "micro_batch_segments": ListColumn(batch_segments, num_batches),
        "segment_lengths": ListColumn(lengths[order], counts),
        "segment_row_ids": ListColumn(list_values(table, "sample_row_ids")[order], counts),
        "segment_source_ids": ListColumn(list_values(table, "sample_source_ids")[order], counts),
        "input_ids": ListColumn(ids, num_tokens),
        "loss_mask": ListColumn(mask, num_tokens),
    }


def _trained_columns(table: pa.Table, lengths: Int32, counts: Int64) -> dict[str, Any]:
    """Return the columns that count trained labels, of each step and of its sources."""
    trained = _trained_labels(list_values(table, "loss_mask"), lengths)
    steps = np.repeat(np.arange(table.num_rows), counts)
    by_step = np.bincount(steps, weights=trained, minlength=table.num_rows).astype(np.int64)
    num_sources = len(table["source_rows"][0])
    by_source = count_by_source(
        steps, list_values(table, "sample_source_ids"), table.num_rows, num_sources, trained
    )
    return {"num_trained_tokens": by_step, "source_trained_tokens": by_source}


def _trained_labels(loss_mask: UInt8, lengths: Int32) -> Int64:
    """Return how many labels of each sample are trained: int64 [samples].

    A label is the next token of the sample: every trained token but a sample's first is one.
    """
    if not len(lengths):
        return np.zeros(0, np.int64)
    starts = offsets_of(lengths)[:-1]
    counts: Int64 = np.add.reduceat(loss_mask, starts, dtype=np.int32).astype(np.int64)
    return counts - loss_mask[starts]


# --- the whole stream -----------------------------------------------------------------------------


def make_plan(manifest: Manifest, config: DataConfig) -> Plan:
    """Return the plan of a stream over a manifest."""
    source_groups = []
    for source in manifest.sources:
        source_groups.append(sum(len(file.row_groups) for file in source.files))
    return Plan(manifest.group_starts, offsets_of(source_groups), config.order)


def source_formats(manifest: Manifest) -> list[RowFormat]:
    """Return the row format of each source."""
    return [source.format for source in manifest.sources]


def encoder_of(config: EncodeConfig) -> Encoder:
    """Return the process's encoder for a configuration: certified, or rebuilt, once."""
    return kept_encoders.encoder_of(config)


def each_step(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the steps of tables, each as a table of one row."""
    for table in tables:
        for index in range(table.num_rows):
            yield table.slice(index, 1)


def local_steps(manifest: Manifest, config: DataConfig, consumed_rows: int = 0) -> Iterator[Step]:
    """Yield the steps of the whole stream, made in this process without Ray."""
    plan = make_plan(manifest, config)
    encoder = encoder_of(config.encode)
    formats = source_formats(manifest)
    for ref in plan.windows(consumed_rows):
        for raw in read_window(manifest, plan, ref, consumed_rows):
            encoded = encode_steps(raw, formats, encoder, config.held_out_fraction, config.held_out)
            yield from unpack(pack_steps(encoded, config.pack))
