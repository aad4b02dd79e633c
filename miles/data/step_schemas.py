"""The tables of the stream, in Arrow: one row is one step, in every stage.

RAW_STEP       read -> encode    a step's rows as plain turns, or as JSON text
ENCODED_STEP   encode -> pack    a step's samples as token ids and masks, in row order
PACKED_STEP    pack -> feed      the same samples, rank by rank, micro-batch by micro-batch
PREPARED_STEP  read -> prepare   a step's rows as OpenAI messages, with token counts
PARTS_STEP     prepare -> parts  the counts, and the Parquet file that is full after the step

`MESSAGES` is the one table here of which a row is a row: what `prepare` writes.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from miles.data.types import EXTRA, STAGES

_FUNCTION = pa.struct([("name", pa.string()), ("arguments", pa.string())])
_CALL = pa.struct([("id", pa.string()), ("type", pa.string()), ("function", _FUNCTION)])
_MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        ("reasoning_content", pa.string()),
        ("name", pa.string()),
        ("tool_call_id", pa.string()),
        ("tool_calls", pa.list_(_CALL)),
        # JSON: an object of the keys that have no field of their own above.
        (EXTRA, pa.string()),
        # 1 or 0: the row flags this turn as trained or not; null: it has no flag.
        ("weight", pa.int8()),
    ]
)
MESSAGES = pa.schema(
    [
        ("row_id", pa.int64()),
        ("source", pa.string()),
        ("messages", pa.list_(_MESSAGE)),
        ("tools", pa.string()),  # JSON
        ("chat_template_kwargs", pa.string()),  # JSON
        ("text", pa.string()),
    ]
)
"""The columns of prepared rows. A row has messages or a text."""

PAYLOAD = pa.large_binary()
"""A row as JSON text."""
TURN = pa.struct([("role", pa.large_string()), ("content", pa.large_string())])
TURNS = pa.large_list(TURN)
"""A row as plain turns: the role's name and the content of each, as they were written."""

# Every column of the step tables, once.
_COLUMNS: Mapping[str, pa.DataType] = {
    # where the step stands
    "step": pa.int64(),  # counting over epochs
    "epoch": pa.float64(),  # epochs consumed after the step
    "next_row": pa.int64(),
    "num_rows": pa.int32(),
    # its rows as they were read
    "row_ids": pa.list_(pa.int64()),
    "source_ids": pa.list_(pa.int32()),
    "payloads": pa.large_list(PAYLOAD),  # null where a row is plain turns
    "turns": pa.large_list(TURNS),  # null where a row is JSON text
    # what became of them: one number a source
    "source_rows": pa.list_(pa.int64()),
    "source_truncated": pa.list_(pa.int64()),
    "source_held_out": pa.list_(pa.int64()),
    "rejects": pa.list_(  # the fields of `Reject`
        pa.struct(
            [
                pa.field("row_id", pa.int64()),
                pa.field("source_id", pa.int32()),
                pa.field("reason", pa.string()),
                pa.field("detail", pa.string()),
                pa.field("position", pa.int32()),
            ]
        )
    ),
    "unused_keys": pa.list_(  # the fields of `KeyCount`
        pa.struct(
            [
                pa.field("source_id", pa.int32()),
                pa.field("key", pa.string()),
                pa.field("num_rows", pa.int64()),
            ]
        )
    ),
    # its samples, in row order
    "sample_row_ids": pa.list_(pa.int64()),
    "sample_source_ids": pa.list_(pa.int32()),
    "sample_lengths": pa.list_(pa.int32()),
    "sample_trained_tokens": pa.list_(pa.int32()),
    "rows": pa.large_list(pa.struct(list(MESSAGES))),  # its samples as `MESSAGES`
    "part": pa.large_binary(),  # a Parquet file that ends with the step; null: none does
    # its tokens, sample after sample
    "input_ids": pa.large_list(pa.int32()),
    "loss_mask": pa.large_list(pa.uint8()),  # of tokens, not yet shifted
    "num_straddling_tokens": pa.int32(),
    "fingerprint": pa.string(),
    # how it is packed: rank 0's micro-batches, rank 1's, …; segments in that order
    "dp_size": pa.int32(),
    "micro_batch_segments": pa.list_(pa.int32()),
    "segment_lengths": pa.list_(pa.int32()),
    "segment_row_ids": pa.list_(pa.int64()),
    "segment_source_ids": pa.list_(pa.int32()),
    "num_trained_tokens": pa.int64(),
    "source_trained_tokens": pa.list_(pa.int64()),
    "pack_fill": pa.float64(),
    "dp_imbalance": pa.float64(),
    # what it cost
    **{f"{stage}_seconds": pa.float64() for stage in STAGES},
}

POSITION_COLUMNS = ("step", "epoch", "next_row", "num_rows")
"""Columns that every step table has."""
_ROW_COUNTS = (
    "source_rows",
    "source_truncated",
    "source_held_out",
    "rejects",
    "unused_keys",
)
_SAMPLES = ("sample_row_ids", "sample_source_ids", "sample_lengths")
_TOKENS = ("input_ids", "loss_mask", "num_straddling_tokens", "fingerprint")
_SEGMENTS = (
    "micro_batch_segments",
    "segment_lengths",
    "segment_row_ids",
    "segment_source_ids",
)
_PACKING = ("dp_size", "num_trained_tokens", "source_trained_tokens", "pack_fill", "dp_imbalance")


def _step_schema(*names: str) -> pa.Schema:
    """Return the schema of a step table with these columns."""
    return pa.schema([pa.field(name, _COLUMNS[name]) for name in (*POSITION_COLUMNS, *names)])


def _seconds(*stages: str) -> tuple[str, ...]:
    """Return the columns that hold the seconds of these stages."""
    return tuple(f"{stage}_seconds" for stage in stages)


RAW_STEP = _step_schema("row_ids", "source_ids", "payloads", "turns", *_seconds("read"))

ENCODED_STEP = _step_schema(
    *_ROW_COUNTS, *_SAMPLES, *_TOKENS, *_seconds("read", "normalize", "encode")
)

PACKED_STEP = _step_schema(*_ROW_COUNTS, *_TOKENS, *_SEGMENTS, *_PACKING, *_seconds(*STAGES))

_PREPARED = (*_ROW_COUNTS, *_SAMPLES, "sample_trained_tokens")
PREPARED_STEP = _step_schema(*_PREPARED, "rows")
PARTS_STEP = _step_schema(*_PREPARED, "part")
