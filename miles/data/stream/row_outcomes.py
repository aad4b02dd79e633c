"""The outcome of each row of a step: left out, rejected, or a sample.

    plain turns, or JSON text -> normalize -> [hold out] -> encode -> sample
                              reject      left out      reject

A table goes this way some rows at a time (`_CHUNK_BYTES`), so that the objects, texts and arrays in
between are those of a few long rows, not of the table's thousand.

A stream leaves out the held-out rows (training) or all others (evaluation). Which rows are held out
is decided by a hash of what they say (`hash_share`), wherever they lie.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from miles.common.offsets import offsets_of
from miles.data.config import RowFormat
from miles.data.encoding.encoder import Encoder
from miles.data.encoding.samples import concatenated
from miles.data.files.raw_rows import RawRows
from miles.data.rejecting import or_rejected
from miles.data.rows.normalize import normalize
from miles.data.rows.plain_turns import normalize_plain
from miles.data.stream.step_tables import list_values
from miles.data.types import (
    Bool,
    Conversation,
    Encoded,
    EncodedRows,
    Float64,
    Int32,
    Int64,
    KeyCount,
    Reject,
    RowRejected,
    Samples,
)
from miles.data.unused_names import count_row

_CHUNK_BYTES = 8 << 20
"""Rows are normalized and encoded together up to this size as they were read, or one row alone."""
_GROUP_ROWS = 256
"""Rows that are looked at here and now are encoded together up to this number: who waits sees them
come."""

TakeKept = Callable[[Int64, Sequence[Conversation]], None]
"""Is given the kept rows of each chunk, by their number in the table, and their conversations."""


@dataclass(frozen=True, eq=False)
class TableOutcome:
    """The rows of some steps by what became of them. The samples are in row order."""

    sample_counts: Int64
    """int64 [steps]: samples of each"""
    kept_rows: Int64
    """int64 [samples]: which of the table's rows each comes from"""
    samples: Samples
    left_out_rows: Int64
    """int64: which of the table's rows this stream leaves to the other one"""
    rejects: list[list[dict[str, Any]]]
    """[steps]: the fields of a `Reject` for each row that cannot be used"""
    unused_keys: list[list[dict[str, Any]]]
    """[steps]: the fields of a `KeyCount` for each key of messages that nothing reads"""
    normalize_seconds: Float64
    """float64 [steps]: what each took, by its rows"""
    encode_seconds: Float64


def table_outcome(
    table: pa.Table,
    formats: Sequence[RowFormat],
    encoder: Encoder,
    held_out_fraction: float = 0.0,
    held_out: str = "leave_out",
    take_kept: TakeKept | None = None,
) -> TableOutcome:
    """Return what becomes of the rows of a table, encoded many at once.

    Args:
        table: RAW_STEP.
        formats: the row format of each source.
        encoder: of this process.
        held_out_fraction: rows whose `hash_share` is below are held out.
        held_out: as in `DataConfig`.
        take_kept: what to do with the conversations, which are not kept here.
    """
    places = _RowPlaces.of(table)
    raw = raw_rows_of(table)
    counts = _KeyCounts(places.num_steps)
    chunks = []
    for begin, end in _chunks(raw):
        started = time.perf_counter()
        rows = places.between(begin, end)
        normalized = normalize_rows(raw.slice(begin, end - begin), rows.source_ids, formats)
        if held_out_fraction > 0 or held_out == "only":
            is_kept = [is_in_stream(row, held_out_fraction, held_out) for row in normalized]
            normalized = list(compress(normalized, is_kept))
            rows = rows.kept(is_kept)

        normalized_at = time.perf_counter()
        encoded = _encode_rows(normalized, encoder)
        counts.add(normalized, rows, encoder)
        if take_kept is not None:
            kept = [normalized[row] for row in encoded.kept_rows.tolist()]
            take_kept(rows.numbers[encoded.kept_rows], kept)  # type: ignore[arg-type]
        seconds = (normalized_at - started, time.perf_counter() - normalized_at)
        chunks.append(_Chunk(rows, encoded, *seconds))
    return _joined(chunks, places, counts)


@dataclass(frozen=True, eq=False)
class _RowPlaces:
    """Some rows of a table of RAW_STEP, in its order, and where they come from."""

    num_steps: int
    """of the table"""
    numbers: Int64
    """int64 [rows]: which of the table's rows each is"""
    steps: Int64
    """int64 [rows]: which of the table's steps it is in"""
    row_ids: Int64
    """int64 [rows]"""
    source_ids: Int32
    """int32 [rows]"""

    @classmethod
    def of(cls, table: pa.Table) -> _RowPlaces:
        """Return the places of all rows of a table."""
        row_ids = list_values(table, "row_ids")
        return cls(
            num_steps=table.num_rows,
            numbers=np.arange(len(row_ids)),
            steps=np.repeat(np.arange(table.num_rows), table["num_rows"].to_numpy()),
            row_ids=row_ids,
            source_ids=list_values(table, "source_ids"),
        )

    def between(self, begin: int, end: int) -> _RowPlaces:
        """Return the places of rows that follow one another."""
        return self._some(slice(begin, end))

    def kept(self, is_kept: Sequence[bool] | Bool) -> _RowPlaces:
        """Return the places of some of the rows."""
        return self._some(np.array(is_kept, np.bool_))

    def _some(self, which: slice | Bool) -> _RowPlaces:
        return replace(
            self,
            numbers=self.numbers[which],
            steps=self.steps[which],
            row_ids=self.row_ids[which],
            source_ids=self.source_ids[which],
        )


class _Chunk(NamedTuple):
    """Rows that were encoded together, without those that are left out."""

    places: _RowPlaces
    encoded: EncodedRows
    """its rows are numbered within the chunk"""
    normalize_seconds: float
    encode_seconds: float


def _chunks(raw: RawRows) -> Iterator[tuple[int, int]]:
    """Yield the first row of each chunk of a table, and the row after its last."""
    if raw.payloads.nbytes + raw.turns.nbytes <= _CHUNK_BYTES:  # most tables
        yield 0, len(raw)
        return

    ends = raw.num_bytes().cumsum()
    begin = 0
    while begin < len(raw):
        bytes_before = ends[begin - 1] if begin else 0
        end = int(ends.searchsorted(bytes_before + _CHUNK_BYTES, side="right"))
        end = max(end, begin + 1)
        yield begin, end
        begin = end


def _joined(chunks: Sequence[_Chunk], table: _RowPlaces, counts: _KeyCounts) -> TableOutcome:
    """Return the outcome of a table from those of its chunks.

    Args:
        table: the places of all its rows.
        counts: the unused keys of all its rows.
    """
    in_stream = np.concatenate([chunk.places.numbers for chunk in chunks])
    rows = table.kept(np.isin(table.numbers, in_stream, assume_unique=True))
    first_rows = offsets_of([len(chunk.places.numbers) for chunk in chunks]).tolist()
    parts = [chunk.encoded.samples for chunk in chunks]
    kept = []
    rejected: dict[int, RowRejected] = {}
    for chunk, first_row in zip(chunks, first_rows[:-1], strict=True):
        kept.append(chunk.encoded.kept_rows + first_row)
        for row, reject in chunk.encoded.rejected.items():
            rejected[row + first_row] = reject

    kept_rows = np.concatenate(kept)
    row_shares = np.bincount(table.steps, minlength=table.num_steps) / max(len(table.steps), 1)
    return TableOutcome(
        sample_counts=np.bincount(rows.steps[kept_rows], minlength=table.num_steps),
        kept_rows=rows.numbers[kept_rows],
        samples=parts[0] if len(parts) == 1 else concatenated(parts),
        left_out_rows=np.setdiff1d(table.numbers, in_stream, assume_unique=True),
        rejects=_rejects(rejected, rows),
        unused_keys=counts.by_step(),
        normalize_seconds=row_shares * sum(chunk.normalize_seconds for chunk in chunks),
        encode_seconds=row_shares * sum(chunk.encode_seconds for chunk in chunks),
    )


def raw_rows_of(table: pa.Table) -> RawRows:
    """Return the rows of a table of RAW_STEP, end to end."""
    payloads, turns = (table[name].combine_chunks().flatten() for name in ("payloads", "turns"))
    return RawRows(payloads, turns)


def normalize_rows(
    rows: RawRows, source_ids: Int32, formats: Sequence[RowFormat]
) -> list[Conversation | RowRejected]:
    """Return the conversation of each row, or why it has none.

    Args:
        rows: as they were read.
        source_ids: int32 [rows].
        formats: the row format of each source.
    """
    is_plain = rows.turns.is_valid().to_numpy(zero_copy_only=False)
    plain = normalize_plain(rows.turns.drop_null(), source_ids[is_plain], formats)
    if len(plain) == len(rows):  # most tables
        return plain

    following = iter(plain)
    return [
        next(following) if payload is None else or_rejected(normalize, payload, formats[source_id])
        for payload, source_id in zip(rows.payloads.to_pylist(), source_ids.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class RowOutcome:
    """The sample or the reject that one row becomes."""

    result: Encoded | RowRejected
    unused_keys: tuple[str, ...]
    """keys of its messages that nothing reads"""
    is_held_out: bool
    """it is left to the evaluation"""
    conversation: Conversation | None = None
    """what was encoded; None: the row has none"""


def row_outcomes(
    payloads: Sequence[bytes],
    formats: Sequence[RowFormat],
    encoder: Encoder,
    held_out_fraction: float = 0.0,
) -> Iterator[RowOutcome]:
    """Yield what becomes of each of some rows, given as JSON text.

    Args:
        formats: the row format of each row.
    """
    for begin, end in _groups(payloads):
        rows = [
            or_rejected(normalize, payload, row_format)
            for payload, row_format in zip(payloads[begin:end], formats[begin:end], strict=True)
        ]
        conversations = [row for row in rows if isinstance(row, Conversation)]
        encoded = iter(encoder.encode_all(conversations))
        for row in rows:
            is_held_out = held_out_fraction > 0 and is_in_stream(row, held_out_fraction, "only")
            if isinstance(row, RowRejected):
                yield RowOutcome(row, (), is_held_out)
            else:
                yield RowOutcome(next(encoded), encoder.unused_keys(row), is_held_out, row)


def _groups(payloads: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Yield the first row of each group that is encoded together, and the row after its last."""
    begin = num_bytes = 0
    for row, payload in enumerate(payloads):
        num_bytes += len(payload)
        if row > begin and (num_bytes > _CHUNK_BYTES or row - begin == _GROUP_ROWS):
            yield begin, row
            begin, num_bytes = row, len(payload)
    if payloads:
        yield begin, len(payloads)


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


def _encode_rows(normalized: Sequence[Conversation | RowRejected], encoder: Encoder) -> EncodedRows:
    """Encode the rows that have a conversation; the others stay rejected."""
    rejected = {row: item for row, item in enumerate(normalized) if isinstance(item, RowRejected)}
    if not rejected:  # most tables
        return encoder.encode_rows(normalized)  # type: ignore[arg-type]

    conversations = [item for item in normalized if isinstance(item, Conversation)]
    encoded = encoder.encode_rows(conversations)
    rows = np.delete(np.arange(len(normalized)), list(rejected))
    rejected |= {int(rows[number]): reject for number, reject in encoded.rejected.items()}
    return EncodedRows(encoded.samples, rows[encoded.kept_rows], dict(sorted(rejected.items())))


def _rejects(rejected: Mapping[int, RowRejected], rows: _RowPlaces) -> list[list[dict[str, Any]]]:
    """Return for each step the fields of a `Reject` for each row that was rejected.

    Args:
        rejected: number of a row, among those not left out, ascending -> the reason.
        rows: the rows that are not left out.
    """
    by_step: list[list[dict[str, Any]]] = [[] for _ in range(rows.num_steps)]
    for row, rejection in rejected.items():
        step = int(rows.steps[row])
        reject = Reject(
            int(rows.row_ids[row]),
            int(rows.source_ids[row]),
            rejection.reason,
            rejection.detail,
            position=row - int(rows.steps.searchsorted(step)),
        )
        by_step[step].append(asdict(reject))
    return by_step


class _KeyCounts:
    """Counts the rows that have a key of messages which nothing reads, by step and source."""

    def __init__(self, num_steps: int) -> None:
        self._steps: list[dict[int, dict[str, int]]] = [{} for _ in range(num_steps)]

    def add(
        self,
        normalized: Sequence[Conversation | RowRejected],
        rows: _RowPlaces,
        encoder: Encoder,
    ) -> None:
        """Count rows.

        Args:
            normalized: the rows that are not left out. A row that is rejected later counts.
            rows: the places of the same rows.
            encoder: knows what the chat template reads.
        """
        for row, conversation in enumerate(normalized):
            if isinstance(conversation, RowRejected):
                continue
            if keys := encoder.unused_keys(conversation):
                by_source = self._steps[rows.steps[row]]
                count_row(by_source.setdefault(int(rows.source_ids[row]), {}), keys)

    def by_step(self) -> list[list[dict[str, Any]]]:
        """Return for each step the fields of a `KeyCount` for each source and key."""
        return list(map(_key_counts, self._steps))


def _key_counts(by_source: Mapping[int, Mapping[str, int]]) -> list[dict[str, Any]]:
    """Return the fields of a `KeyCount` for each source and key."""
    counts = []
    for source_id, by_key in by_source.items():
        for key, num_rows in by_key.items():
            counts.append(asdict(KeyCount(source_id, key, num_rows)))
    return counts
