"""Rows of a table that are plain turns -> these turns in Arrow, with no JSON between.

    source  conversations: list<struct<from, value, weight>>
    "a"     [{"from": "human", "value": "2+2?", "weight": null}, …]   plain
    "a"     [{"from": "human", "value": "2+2?", "weight": 1}, …]      read as JSON (`row_json`)

A row is plain if normalizing its JSON would look at the role and content of each turn, at nothing
else, and could read it: each turn has two texts and no more, every column that matters beside them
is null, and all of the row has a place in JSON that is not too long. What is not known to be plain
is read as JSON: that path stays the definition.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from miles.common.offsets import offsets_of
from miles.data.config import RowFormat
from miles.data.files.arrow_types import is_any_list, is_text, is_valid, parts
from miles.data.files.json_sizes import (
    ESCAPED_BYTES,
    has_size,
    list_lengths,
    most_bytes,
    sums_of_lists,
    text_lengths,
)
from miles.data.files.raw_rows import RawRows, json_rows
from miles.data.files.row_columns import BESIDE_TURNS, FURTHER_COLUMNS, TOOLS_WITHIN, USUAL_COLUMNS
from miles.data.files.row_json import rows_to_json
from miles.data.step_schemas import PAYLOAD, TURN, TURNS
from miles.data.types import UNREADABLE_ROW, Bool, Int64

MAX_PLAIN_BYTES = 8 << 20
"""A row whose JSON may be longer is read as JSON: normalizing judges it by its length."""
_TURN_BYTES = 64
"""The JSON of a turn has at most these beside its texts."""
_MAX_PARTS = 100
"""Fields nested in a column. One that has more may be too deep for JSON."""
_ROLES = ("role", "from")
_CONTENTS = ("content", "value")
_TOOLS = "tools"


@dataclass(frozen=True)
class _TurnColumn:
    """The column of a table that holds its turns."""

    name: str
    role: int
    """number of the field within a turn"""
    content: int
    """the same"""
    rivals: frozenset[str]
    """columns that may have a say where they are not null"""
    named: frozenset[str]
    """those that the user named, among them"""


def raw_rows(batch: pa.RecordBatch, numbers: Int64, format: RowFormat) -> RawRows:
    """Return some rows of a batch: as plain turns where they are plain, the others as JSON.

    Args:
        numbers: int64 [rows], of the rows within the batch, ascending.
        format: of the source.
    """
    column = _turn_column(batch.schema, format)
    if column is None or not is_valid(batch):
        return json_rows(rows_to_json(batch, numbers))

    turns = _plain_turns(batch, column)
    if len(numbers) < batch.num_rows:
        turns = turns.take(pa.array(numbers))
    if not turns.null_count:
        return RawRows(pa.nulls(len(turns), PAYLOAD), turns)

    is_json = turns.is_null().to_numpy(zero_copy_only=False)
    payloads = np.full(len(turns), None, object)
    payloads[is_json] = rows_to_json(batch, numbers[is_json])
    return RawRows(pa.array(payloads, PAYLOAD), turns)


# --- what the types tell --------------------------------------------------------------------------


def _turn_column(schema: pa.Schema, format: RowFormat) -> _TurnColumn | None:
    """Return the column of a table whose rows may be plain; None: there is none."""
    if format.shape != "messages" or any(map(_may_be_deep, schema)):
        return None

    named = format.columns.get("messages")
    others = [name for field, name in format.columns.items() if field != "messages"]
    named_others = frozenset((*others, *(name.partition(".")[0] for name in others)))
    usual, further = USUAL_COLUMNS["messages"], FURTHER_COLUMNS["messages"]
    choices = [(usual, usual), (further, usual + further)] if named is None else [((named,), ())]
    for names, rivals in choices:
        for field in schema:
            is_chosen = field.name in names or (named is None and field.name.lower() in names)
            is_alone = field.name.lower() not in BESIDE_TURNS and named_others.isdisjoint(
                (field.name, field.name.lower())
            )
            places = _role_and_content(field.type) if is_chosen and is_alone else None
            if places is not None:
                role, content = places
                all_rivals = BESIDE_TURNS.union(rivals, named_others)
                return _TurnColumn(field.name, role, content, all_rivals, named_others)
    return None


def _may_be_deep(column: pa.Field) -> bool:
    return sum(1 for _ in parts(column)) > _MAX_PARTS


def _role_and_content(kind: pa.DataType) -> tuple[int, int] | None:
    """Return the places of the two texts in turns of a type; None: it is not a list of such."""
    if not is_any_list(kind) or not pa.types.is_struct(kind.value_type):
        return None
    turn = kind.value_type
    names = [field.name for field in turn]
    role = next((name for name in _ROLES if name in names), None)
    content = next((name for name in _CONTENTS if name in names), None)
    if role is None or content is None:
        return None
    if not is_text(turn.field(role).type) or not is_text(turn.field(content).type):
        return None
    return names.index(role), names.index(content)


# --- what the values tell -------------------------------------------------------------------------


def _plain_turns(batch: pa.RecordBatch, column: _TurnColumn) -> pa.Array:
    """Return the turns of each row, `TURNS` [rows]; null where the row is not plain."""
    lists = batch.column(column.name)
    lengths = list_lengths(lists)
    fields = lists.flatten().flatten()
    role, content = _as_text(fields[column.role]), _as_text(fields[column.content])

    # Padding is no key of a turn; whatever else is null counts.
    is_odd_turn = _is_null(role) | _is_null(content)
    for number, field in enumerate(fields):
        if number not in (column.role, column.content):
            is_odd_turn |= ~_is_null(field)
    texts_bytes = (text_lengths(role) + text_lengths(content)) * ESCAPED_BYTES
    row_bytes = sums_of_lists(texts_bytes + _TURN_BYTES, lengths)
    is_plain = (lengths > 0) & (sums_of_lists(is_odd_turn.astype(np.int64), lengths) == 0)

    others = [name for name in batch.schema.names if name != column.name]
    for name in others:
        is_plain &= _says_nothing(batch, name, column)
    row_bytes += _most_bytes(batch.select(others))
    is_plain &= row_bytes <= MAX_PLAIN_BYTES

    turns = pa.StructArray.from_arrays([role, content], fields=list(TURN))
    mask = None if is_plain.all() else pa.array(~is_plain)
    offsets = pa.array(offsets_of(lengths))
    return pa.LargeListArray.from_arrays(offsets, turns, type=TURNS, mask=mask)


def _says_nothing(batch: pa.RecordBatch, name: str, column: _TurnColumn) -> Bool | bool:
    """Return in which rows a column beside the turns has no say: bool [rows], or all."""
    if name not in column.rivals and name.lower() not in column.rivals:
        return True
    values = batch.column(name)
    if name.lower() != TOOLS_WITHIN or name in column.named:
        return _is_null(values)

    if pa.types.is_struct(values.type):
        return _TOOLS not in [field.name for field in values.type] or _is_null(values)
    if is_text(values.type):
        speaks = pc.match_substring(_as_text(values), f'"{_TOOLS}"').fill_null(False)
        return ~speaks.to_numpy(zero_copy_only=False)
    return _is_null(values)


def _most_bytes(batch: pa.RecordBatch) -> Int64:
    """Return at most how long the JSON of each row is; of one that has no JSON, too long."""
    sizes = np.zeros(batch.num_rows, np.int64)
    unsure = []
    for name, values in zip(batch.schema.names, batch.columns, strict=True):
        if has_size(values.type):
            sizes += most_bytes(values) + len(name.encode()) * ESCAPED_BYTES
        else:
            unsure.append(name)

    if unsure:
        for number, row in enumerate(rows_to_json(batch.select(unsure), np.arange(len(sizes)))):
            sizes[number] += MAX_PLAIN_BYTES + 1 if row == UNREADABLE_ROW else len(row)
    return sizes


def _as_text(texts: pa.Array) -> pa.Array:
    """Return texts of any layout as large_string."""
    if pa.types.is_dictionary(texts.type):
        words = texts.dictionary.cast(pa.large_string())
        return pa.DictionaryArray.from_arrays(texts.indices, words).dictionary_decode()
    return texts.cast(pa.large_string())


def _is_null(values: pa.Array) -> Bool:
    """Return which values are null: bool [values]."""
    is_null: Bool = values.is_null().to_numpy(zero_copy_only=False)
    return is_null
