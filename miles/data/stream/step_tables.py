"""Arrow tables of steps: built from columns, and read back.

    ListColumn([7, 8, 9], counts=[2, 1])    ->    [[7, 8], [9]]      the lists of two steps

No function here knows the meaning of a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from miles.common.offsets import offsets_of
from miles.data.types import Int32, Int64


@dataclass(frozen=True, eq=False)
class ListColumn:
    """A column of lists, one a step."""

    values: Any
    """of all steps, end to end"""
    counts: Sequence[int] | Int64
    """[steps]: how many of the values each has"""


def step_table(schema: pa.Schema, columns: dict[str, Any]) -> pa.Table:
    """Return a table of steps.

    Args:
        schema: names the columns, and gives their types.
        columns: for each name one value a step, a `ListColumn`, or a column of another table.
    """
    arrays = [_array(field.type, columns[field.name]) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def carried(table: pa.Table, schema: pa.Schema) -> dict[str, Any]:
    """Return the columns of a table that the next stage's schema has as well."""
    return {name: table[name] for name in table.column_names if name in schema.names}


def list_values(table: pa.Table, name: str) -> Any:
    """Return the values of a list column, end to end."""
    return table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)


def list_counts(table: pa.Table, name: str) -> Int64:
    """Return how many values each step has in a list column: int64 [steps]."""
    counts: Int64 = table[name].combine_chunks().value_lengths().to_numpy().astype(np.int64)
    return counts


def reordered(values: Any, lengths: Int32, order: Int64) -> Any:
    """Return lists of numbers in another order, end to end.

    Args:
        values: [numbers]: of all lists, end to end.
        lengths: int32 [lists].
        order: int64 [lists]: which list comes at each place.
    """
    # To Arrow, the lists are strings of bytes, which it copies whole.
    starts = offsets_of(lengths) * values.itemsize
    buffers = [None, pa.py_buffer(starts), pa.py_buffer(values)]
    taken = pa.Array.from_buffers(pa.large_binary(), len(lengths), buffers).take(pa.array(order))
    data = taken.buffers()[2]
    return np.frombuffer(data, values.dtype) if data else np.zeros(0, values.dtype)


def count_by_source(
    steps: Int64, sources: Int32, num_steps: int, num_sources: int, weights: Int64 | None = None
) -> ListColumn:
    """Return for each step how many items each source has.

    Args:
        steps: int64 [items], the step of each.
        sources: int32 [items], the source of each.
        num_steps: of the table.
        num_sources: of the stream.
        weights: int64 [items]; if given, their sums are returned instead of the counts.
    """
    places = steps * num_sources + sources
    counts = np.bincount(places, weights=weights, minlength=num_steps * num_sources)
    return ListColumn(counts.astype(np.int64), [num_sources] * num_steps)


def _array(kind: pa.DataType, column: Any) -> Any:
    """Return one column as an Arrow array of the type."""
    if isinstance(column, pa.ChunkedArray):
        return column
    if not isinstance(column, ListColumn):
        return pa.array(column, kind)

    values = column.values
    if not isinstance(values, pa.Array):
        values = pa.array(values, kind.value_type)
    offsets = offsets_of(column.counts)
    if pa.types.is_large_list(kind):
        return pa.LargeListArray.from_arrays(pa.array(offsets), values)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)
