"""The outcome of each row of a step: left out, rejected, or a sample.

    payload (JSON text) -> normalize -> [hold out] -> encode -> sample
                              reject      left out      reject

A stream leaves out the held-out rows (training) or all others (evaluation). Which rows are held out
is decided by a hash of what they say (`hash_share`), wherever they lie.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import compress, pairwise
from typing import Any

import pyarrow as pa
import xxhash

from miles.common.offsets import offsets_of
from miles.data.config import RowFormat
from miles.data.encoding.encoder import Encoder, or_rejected
from miles.data.rows.normalize import normalize
from miles.data.stream.step_tables import list_values
from miles.data.types import Conversation, Encoded, KeyCount, Reject, RowRejected
from miles.data.unused_names import count_row


@dataclass(frozen=True)
class StepOutcome:
    """The rows of one step by what became of them. The samples are in row order."""

    kept_rows: list[int]
    """[samples]: which of the table's rows each comes from"""
    conversations: list[Conversation]
    """[samples]"""
    encoded: list[Encoded]
    """[samples]"""
    left_out_rows: list[int]
    """which of the table's rows this stream leaves to the other one"""
    rejects: list[dict[str, Any]]
    """the fields of a `Reject` for each row that cannot be used"""
    unused_keys: list[dict[str, Any]]
    """the fields of a `KeyCount` for each key of messages that nothing reads"""
    normalize_seconds: float
    encode_seconds: float


def step_outcomes(
    table: pa.Table,
    formats: Sequence[RowFormat],
    encoder: Encoder,
    held_out_fraction: float = 0.0,
    held_out: str = "leave_out",
) -> Iterator[StepOutcome]:
    """Yield what becomes of each step's rows, for a table of RAW_STEP.

    Args:
        table: RAW_STEP.
        formats: the row format of each source.
        encoder: of this process.
        held_out_fraction: rows whose `hash_share` is below are held out.
        held_out: as in `DataConfig`.
    """
    row_ids = list_values(table, "row_ids").tolist()
    source_ids = list_values(table, "source_ids").tolist()
    payloads = table["payloads"].combine_chunks().flatten().to_pylist()
    leaves_out = held_out_fraction > 0 or held_out == "only"

    # A step at a time: what lives longer costs the garbage collector.
    for begin, end in pairwise(offsets_of(table["num_rows"]).tolist()):
        started = time.perf_counter()
        rows: Sequence[int] = range(begin, end)
        left_out: list[int] = []
        normalized = [
            or_rejected(normalize, payloads[row], formats[source_ids[row]]) for row in rows
        ]
        if leaves_out:
            is_kept = [is_in_stream(row, held_out_fraction, held_out) for row in normalized]
            left_out = [row for row, kept in zip(rows, is_kept, strict=True) if not kept]
            rows = list(compress(rows, is_kept))
            normalized = list(compress(normalized, is_kept))

        normalized_at = time.perf_counter()
        results = _encode_all(normalized, encoder)
        is_sample = [isinstance(result, Encoded) for result in results]
        yield StepOutcome(
            kept_rows=list(compress(rows, is_sample)),
            conversations=list(compress(normalized, is_sample)),  # type: ignore[arg-type]
            encoded=list(compress(results, is_sample)),  # type: ignore[arg-type]
            left_out_rows=left_out,
            rejects=_rejects(rows, results, row_ids, source_ids),
            unused_keys=_unused_keys(rows, normalized, source_ids, encoder),
            normalize_seconds=normalized_at - started,
            encode_seconds=time.perf_counter() - normalized_at,
        )


@dataclass(frozen=True)
class RowOutcome:
    """The sample or the reject that one row becomes."""

    result: Encoded | RowRejected
    unused_keys: tuple[str, ...]
    """keys of its messages that nothing reads"""
    is_held_out: bool
    """it is left to the evaluation"""


def row_outcome(
    payload: bytes, row_format: RowFormat, encoder: Encoder, held_out_fraction: float = 0.0
) -> RowOutcome:
    """Return what becomes of one row, given as JSON text."""
    normalized = or_rejected(normalize, payload, row_format)
    is_held_out = held_out_fraction > 0 and is_in_stream(normalized, held_out_fraction, "only")
    (result,) = _encode_all([normalized], encoder)
    unused_keys = () if isinstance(normalized, RowRejected) else encoder.unused_keys(normalized)
    return RowOutcome(result, unused_keys, is_held_out)


def hash_share(conversation: Conversation) -> float:
    """Return where in [0, 1) a row stands by what it says.

    The roles and contents of its messages and its tools count, or its text. Nothing else does, not
    even where the row lies: copies of a conversation stand at the same place in any file, set and
    order.
    """
    if conversation.text is not None:
        content: Any = conversation.text
    else:
        messages = [(message["role"], message["content"]) for message in conversation.messages]
        content = [messages, conversation.tools]
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return xxhash.xxh64_intdigest(text.encode("utf-8", "surrogatepass")) / 2**64


def is_in_stream(row: Conversation | RowRejected, held_out_fraction: float, held_out: str) -> bool:
    """Return whether a row belongs to a stream.

    A row that has no conversation is the training stream's: it reports the reject.
    """
    is_held_out = isinstance(row, Conversation) and hash_share(row) < held_out_fraction
    return is_held_out == (held_out == "only")


def _encode_all(
    normalized: Sequence[Conversation | RowRejected], encoder: Encoder
) -> list[Encoded | RowRejected]:
    """Encode the rows that have a conversation; the others stay rejected."""
    conversations = [row for row in normalized if isinstance(row, Conversation)]
    encoded = iter(encoder.encode_all(conversations))
    return [next(encoded) if isinstance(row, Conversation) else row for row in normalized]


def _rejects(
    rows: Sequence[int],
    results: Sequence[Encoded | RowRejected],
    row_ids: Sequence[int],
    source_ids: Sequence[int],
) -> list[dict[str, Any]]:
    """Return the fields of a `Reject` for each row that was rejected.

    Args:
        rows: which of the table's rows the results are of.
        results: of a step's rows, without those left out.
        row_ids: [rows of the table].
        source_ids: [rows of the table].
    """
    rejects = []
    for position, (row, result) in enumerate(zip(rows, results, strict=True)):
        if isinstance(result, RowRejected):
            reject = Reject(
                row_ids[row], source_ids[row], result.reason, result.detail, position=position
            )
            rejects.append(asdict(reject))
    return rejects


def _unused_keys(
    rows: Sequence[int],
    normalized: Sequence[Conversation | RowRejected],
    source_ids: Sequence[int],
    encoder: Encoder,
) -> list[dict[str, Any]]:
    """Return the fields of a `KeyCount` for each source and key of messages that nothing reads.

    Args:
        rows: which of the table's rows the conversations are of.
        normalized: a step's rows, without those left out. A row that is rejected later counts.
        source_ids: [rows of the table].
        encoder: knows what the chat template reads.
    """
    by_source: dict[int, dict[str, int]] = {}
    for row, conversation in zip(rows, normalized, strict=True):
        if isinstance(conversation, Conversation) and (keys := encoder.unused_keys(conversation)):
            count_row(by_source.setdefault(source_ids[row], {}), keys)

    counts = []
    for source_id, by_key in by_source.items():
        for key, num_rows in by_key.items():
            counts.append(asdict(KeyCount(source_id, key, num_rows)))
    return counts
