"""The pure functions over Arrow: one table row in is one step, one table row out is the same step.

    read_window   which window      -> RAW_STEP      rows as JSON text
    encode_steps  RAW_STEP          -> ENCODED_STEP  normalized, tokenised, rejects noted
    prepare_steps RAW_STEP          -> PREPARED_STEP conversations and token counts, for `prepare`
    pack_steps    ENCODED_STEP      -> PACKED_STEP   laid out rank by rank
    unpack        PACKED_STEP       -> Step          arrays as the trainer takes them

`local_steps` composes them in one process, without Ray: the definition that the stream is tested against.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from miles.data.config import DataConfig, EncodeConfig, PackConfig, RowFormat
from miles.data.encode import Encoder, or_rejected
from miles.data.manifest import Manifest
from miles.data.normalize import normalize
from miles.data.pack import micro_batch, pack, pack_stats
from miles.data.plan import Plan, WindowRef
from miles.data.read import read_rows
from miles.data.types import (
    ENCODED_STEP,
    PACKED_STEP,
    PREPARED_STEP,
    RAW_STEP,
    STAGES,
    Conversation,
    Encoded,
    Int32,
    Int64,
    MicroBatch,
    Reject,
    RowRejected,
    Step,
    StepReport,
    UInt8,
)

_CARRIED = ("step", "epoch", "next_row", "num_rows")

Segments = tuple[Any, Any, Any, Any, Any]
"""ids int32 [tokens], token mask uint8 [tokens], lengths, row ids, source ids: a micro-batch before the shift."""


def read_window(manifest: Manifest, plan: Plan, ref: WindowRef, consumed_rows: int) -> Iterator[pa.Table]:
    """The steps of a window that begin at `consumed_rows` or later, RAW_STEP. Rows are read once a window."""
    steps = [step for step in plan.window_steps(ref) if step.next_row > consumed_rows]
    if not steps:
        return
    started = time.perf_counter()
    row_ids = np.concatenate([step.row_ids for step in steps])
    payloads = read_rows(manifest, row_ids)
    seconds = (time.perf_counter() - started) / len(steps)
    position = 0
    for step in steps:
        count = len(step.row_ids)
        yield _table(
            RAW_STEP,
            step=step.step,
            epoch=step.epoch,
            next_row=step.next_row,
            num_rows=count,
            row_ids=step.row_ids,
            source_ids=manifest.source_of(step.row_ids),
            payloads=payloads[position : position + count],
            read_seconds=seconds,
        )
        position += count


@dataclass(frozen=True)
class _Outcome:
    """What became of a step's rows."""

    samples: list[tuple[int, int, Conversation, Encoded]]
    """row id, source id, and the row normalized and encoded"""
    rejects: list[Reject]
    normalize_seconds: float
    encode_seconds: float


def _encode_rows(row: pa.Table, formats: Sequence[RowFormat], encoder: Encoder) -> _Outcome:
    row_ids, source_ids = _numpy(row, "row_ids").tolist(), _numpy(row, "source_ids").tolist()
    started = time.perf_counter()
    normalized = [
        or_rejected(normalize, payload, formats[source_id])
        for source_id, payload in zip(source_ids, row["payloads"][0].as_py(), strict=True)
    ]
    middle = time.perf_counter()
    conversations = [outcome for outcome in normalized if isinstance(outcome, Conversation)]
    encoded = iter(encoder.encode_all(conversations))
    samples: list[tuple[int, int, Conversation, Encoded]] = []
    rejects: list[Reject] = []
    for position, (row_id, source_id, outcome) in enumerate(zip(row_ids, source_ids, normalized, strict=True)):
        made = next(encoded) if isinstance(outcome, Conversation) else outcome
        if isinstance(made, RowRejected):
            rejects.append(Reject(row_id, source_id, made.reason, made.detail, position))
        else:
            assert isinstance(outcome, Conversation)
            samples.append((row_id, source_id, outcome, made))
    return _Outcome(samples, rejects, middle - started, time.perf_counter() - middle)


def encode_row(payload: bytes, row_format: RowFormat, encoder: Encoder) -> Encoded | RowRejected:
    """One row by itself, as JSON text."""
    conversation = or_rejected(normalize, payload, row_format)
    return conversation if isinstance(conversation, RowRejected) else encoder.encode_all([conversation])[0]


def encode_steps(table: pa.Table, formats: Sequence[RowFormat], encoder: Encoder) -> Iterator[pa.Table]:
    """RAW_STEP -> ENCODED_STEP, step by step.

    Args:
        formats: what the rows of each source look like.
    """
    for row in _rows(table):
        outcome = _encode_rows(row, formats, encoder)
        encoded = [sample[3] for sample in outcome.samples]
        ids = _concatenate([sample.input_ids for sample in encoded], np.int32)
        mask = _concatenate([sample.loss_mask for sample in encoded], np.uint8)
        lengths = np.array([len(sample.input_ids) for sample in encoded], np.int32)
        digest = xxhash.xxh64()
        for part in (lengths, ids, mask):
            digest.update(np.ascontiguousarray(part).tobytes())
        yield _table(
            ENCODED_STEP,
            **_carry(row, (*_CARRIED, "read_seconds")),
            **_columns(row, outcome, len(formats)),
            fingerprint=digest.hexdigest(),
            sample_lengths=lengths,
            input_ids=ids,
            loss_mask=mask,
            num_straddling_tokens=sum(sample.num_straddling_tokens for sample in encoded),
            normalize_seconds=outcome.normalize_seconds,
            encode_seconds=outcome.encode_seconds,
        )


def prepare_steps(table: pa.Table, formats: Sequence[RowFormat], encoder: Encoder) -> Iterator[pa.Table]:
    """RAW_STEP -> PREPARED_STEP, step by step; arguments as in `encode_steps`."""
    for row in _rows(table):
        outcome = _encode_rows(row, formats, encoder)
        yield _table(
            PREPARED_STEP,
            **_carry(row, _CARRIED),
            **_columns(row, outcome, len(formats)),
            conversations=[json.dumps(vars(sample[2])).encode() for sample in outcome.samples],
            sample_lengths=np.array([len(sample[3].input_ids) for sample in outcome.samples], np.int32),
            sample_trained_tokens=np.array([sample[3].loss_mask.sum() for sample in outcome.samples], np.int32),
        )


def _columns(row: pa.Table, outcome: _Outcome, num_sources: int) -> dict[str, Any]:
    """What an ENCODED_STEP and a PREPARED_STEP say alike of a step's rows."""
    source_ids = np.array([sample[1] for sample in outcome.samples], np.int32)
    is_truncated = np.array([sample[3].is_truncated for sample in outcome.samples], bool)
    return {
        "source_rows": np.bincount(_numpy(row, "source_ids"), minlength=num_sources),
        "source_truncated": np.bincount(source_ids[is_truncated], minlength=num_sources),
        "sample_row_ids": np.array([sample[0] for sample in outcome.samples], np.int64),
        "sample_source_ids": source_ids,
        "rejects": [asdict(reject) for reject in outcome.rejects],
    }


def pack_steps(table: pa.Table, config: PackConfig) -> Iterator[pa.Table]:
    """ENCODED_STEP -> PACKED_STEP, step by step."""
    for row in _rows(table):
        started = time.perf_counter()
        lengths, ids, mask = _numpy(row, "sample_lengths"), _numpy(row, "input_ids"), _numpy(row, "loss_mask")
        source_ids = _numpy(row, "sample_source_ids")
        packed = pack(lengths, config)
        stats = pack_stats(lengths, packed, config)
        trained = _trained_labels(mask, lengths)
        order = np.array([sample for rank in packed for batch in rank for sample in batch], np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        slices = [slice(starts[sample], starts[sample + 1]) for sample in order]
        yield _table(
            PACKED_STEP,
            **_carry(row, (*_CARRIED, "fingerprint", "num_straddling_tokens", "source_rows", "source_truncated")),
            **_carry(row, ("rejects", "read_seconds", "normalize_seconds", "encode_seconds")),
            num_trained_tokens=int(trained.sum()),
            source_trained_tokens=np.bincount(source_ids, weights=trained, minlength=len(row["source_rows"][0])).astype(
                np.int64
            ),
            pack_fill=stats.pack_fill,
            dp_imbalance=stats.dp_imbalance,
            dp_size=config.dp_size,
            micro_batch_segments=np.array([len(batch) for rank in packed for batch in rank], np.int32),
            segment_lengths=lengths[order],
            segment_row_ids=_numpy(row, "sample_row_ids")[order],
            segment_source_ids=source_ids[order],
            input_ids=_concatenate([ids[part] for part in slices], np.int32),
            loss_mask=_concatenate([mask[part] for part in slices], np.uint8),
            pack_seconds=time.perf_counter() - started,
        )


def report_of(row: pa.Table) -> StepReport:
    """The report of a PACKED_STEP."""
    values = _carry(row, [field.name for field in PACKED_STEP if not pa.types.is_large_list(field.type)])
    return StepReport(
        index=values["step"],
        epoch=values["epoch"],
        next_row=values["next_row"],
        num_rows=values["num_rows"],
        num_samples=len(values["segment_lengths"]),
        num_tokens=sum(values["segment_lengths"]),
        num_trained_tokens=values["num_trained_tokens"],
        num_straddling_tokens=values["num_straddling_tokens"],
        fingerprint=values["fingerprint"],
        pack_fill=values["pack_fill"],
        dp_imbalance=values["dp_imbalance"],
        source_rows=tuple(values["source_rows"]),
        source_trained_tokens=tuple(values["source_trained_tokens"]),
        source_truncated=tuple(values["source_truncated"]),
        rejects=tuple(Reject(**reject) for reject in values["rejects"]),
        stage_seconds={stage: values[f"{stage}_seconds"] for stage in STAGES},
    )


def segments_by_rank(row: pa.Table) -> list[list[Segments]]:
    """[dp_size][micro-batches]: a PACKED_STEP's arrays, cut but not yet shifted."""
    ids, mask = _numpy(row, "input_ids"), _numpy(row, "loss_mask")
    lengths, row_ids = _numpy(row, "segment_lengths"), _numpy(row, "segment_row_ids")
    source_ids, counts = _numpy(row, "segment_source_ids"), _numpy(row, "micro_batch_segments")
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ends = np.cumsum(counts)
    cut = [
        (
            ids[starts[end - count] : starts[end]],
            mask[starts[end - count] : starts[end]],
            lengths[end - count : end],
            row_ids[end - count : end],
            source_ids[end - count : end],
        )
        for end, count in zip(ends.tolist(), counts.tolist(), strict=True)
    ]
    ranks = row["dp_size"][0].as_py()
    per_rank = len(cut) // ranks
    return [cut[rank * per_rank : (rank + 1) * per_rank] for rank in range(ranks)]


def micro_batches(segments: Sequence[Segments]) -> tuple[MicroBatch, ...]:
    """One rank's micro-batches, shifted."""
    return tuple(micro_batch(*parts) for parts in segments)


def unpack(row: pa.Table) -> Step:
    """PACKED_STEP -> the step as users hold it."""
    return Step(report_of(row), tuple(micro_batches(rank) for rank in segments_by_rank(row)))


def make_plan(manifest: Manifest, config: DataConfig) -> Plan:
    groups = [sum(len(file.row_groups) for file in source.files) for source in manifest.sources]
    source_groups = np.concatenate([[0], np.cumsum(groups)]).astype(np.int64)
    return Plan(manifest.group_starts, source_groups, config.order)


def source_formats(manifest: Manifest) -> list[RowFormat]:
    """What the rows of each source look like."""
    return [source.format for source in manifest.sources]


def encoder_of(config: EncodeConfig) -> Encoder:
    """The process's encoder for a configuration: certified once."""
    return _encoder_of(json.dumps(asdict(config), sort_keys=True))


@lru_cache(maxsize=4)
def _encoder_of(config: str) -> Encoder:
    return Encoder.from_config(EncodeConfig(**json.loads(config)))


def local_steps(manifest: Manifest, config: DataConfig, consumed_rows: int = 0) -> Iterator[Step]:
    """The whole stream in this process."""
    plan, encoder, formats = make_plan(manifest, config), encoder_of(config.encode), source_formats(manifest)
    for ref in plan.windows(consumed_rows):
        for raw in read_window(manifest, plan, ref, consumed_rows):
            for encoded in encode_steps(raw, formats, encoder):
                for packed in pack_steps(encoded, config.pack):
                    yield unpack(packed)


def _trained_labels(loss_mask: UInt8, lengths: Int32) -> Int64:
    """int64 [samples]: positions whose label is trained, which is every trained token but a sample's first."""
    if not len(lengths):
        return np.zeros(0, np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    counts: Int64 = np.add.reduceat(loss_mask.astype(np.int64), starts)
    return counts - loss_mask[starts]


def _rows(table: pa.Table) -> Iterator[pa.Table]:
    for index in range(table.num_rows):
        yield table.slice(index, 1)


def _numpy(row: pa.Table, name: str) -> Any:
    return row[name].combine_chunks()[0].values.to_numpy(zero_copy_only=False)


def _carry(row: pa.Table, names: Sequence[str]) -> dict[str, Any]:
    return {name: row[name][0].as_py() for name in names}


def _concatenate(parts: Sequence[Any], dtype: Any) -> Any:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _table(schema: pa.Schema, **values: Any) -> pa.Table:
    """A table of one row."""
    columns = []
    for field in schema:
        value = values[field.name]
        if isinstance(value, np.ndarray):
            offset = pa.int64() if pa.types.is_large_list(field.type) else pa.int32()
            kind = pa.LargeListArray if pa.types.is_large_list(field.type) else pa.ListArray
            inner = pa.array(value, field.type.value_type)
            columns.append(kind.from_arrays(pa.array([0, len(value)], offset), inner))
        else:
            columns.append(pa.array([value], field.type))
    return pa.table(columns, schema=schema)
