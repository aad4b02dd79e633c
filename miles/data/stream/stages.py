"""The pure functions over Arrow: one table row is one step, before and behind each of them.

    read_window   which window      -> RAW_STEP      rows as JSON text
    encode_steps  RAW_STEP          -> ENCODED_STEP  normalized, held-out rows left out, tokenised, rejects noted
    prepare_steps RAW_STEP          -> PREPARED_STEP conversations and token counts, for `prepare`
    pack_steps    ENCODED_STEP      -> PACKED_STEP   laid out rank by rank
    unpack        PACKED_STEP       -> Step          in `unpack.py`: arrays as the trainer takes them

A table has some steps, of about `TABLE_ROWS` rows together, so that what Arrow costs is paid once for them; which steps
share a table changes nothing of what is in them. `local_steps` composes the functions in one process, without Ray: the
definition that the stream is tested against.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from miles.common.offsets import offsets_of
from miles.data.config import DataConfig, EncodeConfig, PackConfig, RowFormat
from miles.data.encoding.encoder import Encoder, or_rejected
from miles.data.files.manifest import Manifest
from miles.data.files.read import read_rows, stream_rows
from miles.data.order.plan import Plan, PlannedStep, WindowRef
from miles.data.packing.pack import pack, pack_stats
from miles.data.packing.shards import unpack
from miles.data.rows.normalize import normalize
from miles.data.types import (
    ENCODED_STEP,
    PACKED_STEP,
    PREPARED_STEP,
    RAW_STEP,
    Conversation,
    Encoded,
    Int32,
    Int64,
    Reject,
    RowRejected,
    Step,
    UInt8,
)

TABLE_ROWS = 1_024
"""Rows of the steps in one table, where a step has not more by itself."""

_CARRIED = ["step", "epoch", "next_row", "num_rows"]


def read_window(
    manifest: Manifest, plan: Plan, ref: WindowRef, consumed_rows: int
) -> Iterator[pa.Table]:
    """The steps of a window that begin at `consumed_rows` or later, RAW_STEP. Rows are read once a window: those of a
    shuffled one before its first step, those in file order as the steps come to them."""
    steps = [step for step in plan.window_steps(ref) if step.next_row > consumed_rows]
    if not steps:
        return
    started = time.perf_counter()
    row_ids = np.concatenate([step.row_ids for step in steps])
    rows: Iterator[bytes]
    if (np.diff(row_ids) > 0).all():
        rows = itertools.chain.from_iterable(stream_rows(manifest, row_ids))
    else:
        rows = iter(read_rows(manifest, row_ids))
    window_seconds = (time.perf_counter() - started) / len(steps)
    for group in _groups(steps):
        started = time.perf_counter()
        counts = [len(step.row_ids) for step in group]
        payloads = list(itertools.islice(rows, sum(counts)))
        group_ids = np.concatenate([step.row_ids for step in group])
        seconds = window_seconds + (time.perf_counter() - started) / len(group)
        yield _table(
            RAW_STEP,
            step=[step.step for step in group],
            epoch=[step.epoch for step in group],
            next_row=[step.next_row for step in group],
            num_rows=counts,
            row_ids=(group_ids, counts),
            source_ids=(manifest.source_of(group_ids), counts),
            payloads=(payloads, counts),
            read_seconds=[seconds] * len(group),
        )


def _groups(steps: Sequence[PlannedStep]) -> Iterator[Sequence[PlannedStep]]:
    """Steps that share a table. All but an epoch's last have as many rows."""
    size = max(TABLE_ROWS // len(steps[0].row_ids), 1)
    return (steps[begin : begin + size] for begin in range(0, len(steps), size))


@dataclass(frozen=True)
class _Outcome:
    """What became of a table's rows. The samples are end to end, step by step, in row order."""

    steps: list[int]
    """[samples]: which of the table's steps it is of"""
    row_ids: list[int]
    source_ids: list[int]
    conversations: list[Conversation]
    encoded: list[Encoded]
    left_out: list[int]
    """which of the table's rows were left out, by their hash"""
    rejects: list[list[dict[str, Any]]]
    """[steps][rejects of the step]: the fields of `Reject`"""
    normalize_seconds: list[float]
    """[steps]"""
    encode_seconds: list[float]


def hash_share(conversation: Conversation) -> float:
    """Where in [0, 1) a row stands by what it says: its messages' roles and contents and its tools, or its text.

    Nothing else of the row counts, nor where it lies: copies of a conversation stand at the same place in any file, set
    and order.
    """
    if conversation.text is not None:
        said: Any = conversation.text
    else:
        said = [
            [(message["role"], message["content"]) for message in conversation.messages],
            conversation.tools,
        ]
    text = json.dumps(said, ensure_ascii=False, sort_keys=True)
    return xxhash.xxh64_intdigest(text.encode("utf-8", "surrogatepass")) / 2**64


def _leaves_out(row: Conversation | RowRejected, held_out_fraction: float, held_out: str) -> bool:
    """Whether a stream leaves a row to the other one. What has no conversation, the training stream reports."""
    is_held_out = isinstance(row, Conversation) and hash_share(row) < held_out_fraction
    return is_held_out == (held_out == "leave_out")


def _encode_rows(
    table: pa.Table,
    formats: Sequence[RowFormat],
    encoder: Encoder,
    held_out_fraction: float = 0.0,
    held_out: str = "leave_out",
) -> _Outcome:
    outcome = _Outcome([], [], [], [], [], [], [], [], [])
    starts = offsets_of(table["num_rows"]).tolist()
    row_ids, source_ids = _values(table, "row_ids").tolist(), _values(table, "source_ids").tolist()
    payloads = table["payloads"].combine_chunks().flatten().to_pylist()
    for step, (begin, end) in enumerate(
        pairwise(starts)
    ):  # a step at a time: what lives longer costs the collector
        started = time.perf_counter()
        rows: Sequence[int] = range(begin, end)
        normalized = [
            or_rejected(normalize, payloads[row], formats[source_ids[row]]) for row in rows
        ]
        if held_out_fraction > 0 or held_out == "only":
            goes = [_leaves_out(made, held_out_fraction, held_out) for made in normalized]
            outcome.left_out.extend(itertools.compress(rows, goes))
            rows = [row for row, is_gone in zip(rows, goes, strict=True) if not is_gone]
            normalized = [
                made for made, is_gone in zip(normalized, goes, strict=True) if not is_gone
            ]
        middle = time.perf_counter()
        encoded = iter(
            encoder.encode_all([made for made in normalized if isinstance(made, Conversation)])
        )
        rejects = []
        for position, (row, conversation) in enumerate(zip(rows, normalized, strict=True)):
            made = next(encoded) if isinstance(conversation, Conversation) else conversation
            if isinstance(made, RowRejected):
                rejects.append(
                    asdict(
                        Reject(row_ids[row], source_ids[row], made.reason, made.detail, position)
                    )
                )
                continue
            assert isinstance(conversation, Conversation)
            outcome.steps.append(step)
            outcome.row_ids.append(row_ids[row])
            outcome.source_ids.append(source_ids[row])
            outcome.conversations.append(conversation)
            outcome.encoded.append(made)
        outcome.rejects.append(rejects)
        outcome.normalize_seconds.append(middle - started)
        outcome.encode_seconds.append(time.perf_counter() - middle)
    return outcome


def encode_row(payload: bytes, row_format: RowFormat, encoder: Encoder) -> Encoded | RowRejected:
    """One row by itself, as JSON text."""
    conversation = or_rejected(normalize, payload, row_format)
    return (
        conversation
        if isinstance(conversation, RowRejected)
        else encoder.encode_all([conversation])[0]
    )


def encode_steps(
    table: pa.Table,
    formats: Sequence[RowFormat],
    encoder: Encoder,
    held_out_fraction: float = 0.0,
    held_out: str = "leave_out",
) -> pa.Table:
    """RAW_STEP -> ENCODED_STEP.

    Args:
        formats: what the rows of each source look like.
        held_out_fraction: rows whose `hash_share` is below are held out.
        held_out: as in `DataConfig`. Rows that are left out are not encoded, and no rejects.
    """
    outcome = _encode_rows(table, formats, encoder, held_out_fraction, held_out)
    encoded = outcome.encoded
    ids = _concatenate([sample.input_ids for sample in encoded], np.int32)
    mask = _concatenate([sample.loss_mask for sample in encoded], np.uint8)
    lengths = np.array([len(sample.input_ids) for sample in encoded], np.int32)
    columns = _columns(table, outcome, len(formats))
    of_samples = offsets_of(columns["sample_row_ids"][1])
    of_tokens = offsets_of(lengths)[of_samples]
    straddling = offsets_of([sample.num_straddling_tokens for sample in encoded])[of_samples]
    return _table(
        ENCODED_STEP,
        **_carry(table, [*_CARRIED, "read_seconds"]),
        **columns,
        fingerprint=[
            _fingerprint(lengths[slice(*samples)], ids[slice(*tokens)], mask[slice(*tokens)])
            for samples, tokens in zip(pairwise(of_samples), pairwise(of_tokens), strict=True)
        ],
        sample_lengths=(lengths, np.diff(of_samples)),
        input_ids=(ids, np.diff(of_tokens)),
        loss_mask=(mask, np.diff(of_tokens)),
        num_straddling_tokens=np.diff(straddling),
        normalize_seconds=outcome.normalize_seconds,
        encode_seconds=outcome.encode_seconds,
    )


def _fingerprint(lengths: Int32, ids: Int32, mask: UInt8) -> str:
    digest = xxhash.xxh64()
    for part in (lengths, ids, mask):
        digest.update(part.tobytes())
    return digest.hexdigest()


def prepare_steps(table: pa.Table, formats: Sequence[RowFormat], encoder: Encoder) -> pa.Table:
    """RAW_STEP -> PREPARED_STEP, with all rows; arguments as in `encode_steps`."""
    outcome = _encode_rows(table, formats, encoder)
    columns = _columns(table, outcome, len(formats))
    counts = columns["sample_row_ids"][1]
    lengths = np.array([len(sample.input_ids) for sample in outcome.encoded], np.int32)
    trained = np.array([sample.loss_mask.sum() for sample in outcome.encoded], np.int32)
    return _table(
        PREPARED_STEP,
        **_carry(table, _CARRIED),
        **columns,
        conversations=(
            [json.dumps(vars(conversation)).encode() for conversation in outcome.conversations],
            counts,
        ),
        sample_lengths=(lengths, counts),
        sample_trained_tokens=(trained, counts),
    )


def _columns(table: pa.Table, outcome: _Outcome, num_sources: int) -> dict[str, Any]:
    """What an ENCODED_STEP and a PREPARED_STEP say alike of a step's rows."""
    steps = np.array(outcome.steps, np.int64)
    source_ids = np.array(outcome.source_ids, np.int32)
    is_truncated = np.array([sample.is_truncated for sample in outcome.encoded], bool)
    row_steps = np.repeat(np.arange(table.num_rows), table["num_rows"].to_numpy())
    row_sources = _values(table, "source_ids")
    left_out = np.array(outcome.left_out, np.int64)
    counts = np.bincount(steps, minlength=table.num_rows)
    return {
        "source_rows": _by_source(row_steps, row_sources, table.num_rows, num_sources),
        "source_truncated": _by_source(
            steps[is_truncated], source_ids[is_truncated], table.num_rows, num_sources
        ),
        "source_held_out": _by_source(
            row_steps[left_out], row_sources[left_out], table.num_rows, num_sources
        ),
        "sample_row_ids": (np.array(outcome.row_ids, np.int64), counts),
        "sample_source_ids": (source_ids, counts),
        "rejects": outcome.rejects,
    }


def pack_steps(table: pa.Table, config: PackConfig) -> pa.Table:
    """ENCODED_STEP -> PACKED_STEP."""
    started = time.perf_counter()
    lengths, ids, mask = (
        _values(table, name) for name in ("sample_lengths", "input_ids", "loss_mask")
    )
    source_ids, row_ids = _values(table, "sample_source_ids"), _values(table, "sample_row_ids")
    counts = table["sample_lengths"].combine_chunks().value_lengths().to_numpy()
    packed, stats, taken = [], [], list[int]()
    for begin, end in pairwise(offsets_of(counts)):
        packed.append(pack(lengths[begin:end], config))
        stats.append(pack_stats(lengths[begin:end], packed[-1], config))
        taken += [int(begin) + sample for rank in packed[-1] for batch in rank for sample in batch]
    order = np.array(taken, np.int64)
    begins = offsets_of(lengths)
    slices = [
        slice(begin, end) for begin, end in zip(begins[:-1][order], begins[1:][order], strict=True)
    ]
    tokens = np.diff(begins[offsets_of(counts)])
    trained = _trained_labels(mask, lengths)
    steps = np.repeat(np.arange(table.num_rows), counts)
    num_sources = len(table["source_rows"][0])
    carried = [
        "fingerprint",
        "num_straddling_tokens",
        "source_rows",
        "source_truncated",
        "source_held_out",
        "rejects",
    ]
    return _table(
        PACKED_STEP,
        **_carry(
            table, [*_CARRIED, *carried, "read_seconds", "normalize_seconds", "encode_seconds"]
        ),
        num_trained_tokens=np.bincount(steps, weights=trained, minlength=table.num_rows).astype(
            np.int64
        ),
        source_trained_tokens=_by_source(
            steps, source_ids, table.num_rows, num_sources, weights=trained
        ),
        pack_fill=[one.pack_fill for one in stats],
        dp_imbalance=[one.dp_imbalance for one in stats],
        dp_size=[config.dp_size] * table.num_rows,
        micro_batch_segments=(
            np.array([len(batch) for step in packed for rank in step for batch in rank], np.int32),
            [sum(map(len, step)) for step in packed],
        ),
        segment_lengths=(lengths[order], counts),
        segment_row_ids=(row_ids[order], counts),
        segment_source_ids=(source_ids[order], counts),
        input_ids=(_concatenate([ids[part] for part in slices], np.int32), tokens),
        loss_mask=(_concatenate([mask[part] for part in slices], np.uint8), tokens),
        pack_seconds=[(time.perf_counter() - started) / table.num_rows] * table.num_rows,
    )


def make_plan(manifest: Manifest, config: DataConfig) -> Plan:
    groups = [sum(len(file.row_groups) for file in source.files) for source in manifest.sources]
    return Plan(manifest.group_starts, offsets_of(groups), config.order)


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
    plan, encoder, formats = (
        make_plan(manifest, config),
        encoder_of(config.encode),
        source_formats(manifest),
    )
    for ref in plan.windows(consumed_rows):
        for raw in read_window(manifest, plan, ref, consumed_rows):
            encoded = encode_steps(raw, formats, encoder, config.held_out_fraction, config.held_out)
            yield from unpack(pack_steps(encoded, config.pack))


def _trained_labels(loss_mask: UInt8, lengths: Int32) -> Int64:
    """int64 [samples]: positions whose label is trained, which is every trained token but a sample's first."""
    if not len(lengths):
        return np.zeros(0, np.int64)
    starts = offsets_of(lengths)[:-1]
    counts: Int64 = np.add.reduceat(loss_mask.astype(np.int64), starts)
    return counts - loss_mask[starts]


def _by_source(
    steps: Int64, source_ids: Int32, num_steps: int, num_sources: int, weights: Int64 | None = None
) -> tuple[Int64, list[int]]:
    """A list column: for each step, how many (or how much of `weights`) of each source."""
    places = steps * num_sources + source_ids
    counts = np.bincount(places, weights=weights, minlength=num_steps * num_sources).astype(
        np.int64
    )
    return counts, [num_sources] * num_steps


def _values(table: pa.Table, name: str) -> Any:
    """A list column's values, end to end."""
    return table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _carry(table: pa.Table, names: Sequence[str]) -> dict[str, Any]:
    return {name: table[name] for name in names}


def _concatenate(parts: Sequence[Any], dtype: Any) -> Any:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _table(schema: pa.Schema, **columns: Any) -> pa.Table:
    """A table of steps.

    Args:
        columns: one value a step; a list column also as its values end to end, and how many of them each step has.
    """
    return pa.Table.from_arrays(
        [_column(field.type, columns[field.name]) for field in schema], schema=schema
    )


def _column(kind: pa.DataType, column: Any) -> Any:
    if isinstance(column, pa.ChunkedArray):
        return column
    if not isinstance(column, tuple):
        return pa.array(column, kind)
    values, counts = column
    made, offset = (
        (pa.LargeListArray, np.int64) if pa.types.is_large_list(kind) else (pa.ListArray, np.int32)
    )
    return made.from_arrays(
        pa.array(offsets_of(counts).astype(offset)), pa.array(values, kind.value_type)
    )
