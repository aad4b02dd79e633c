"""Columns of step tables: lists are built end to end and read back."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from miles.data.stream.step_tables import (
    ListColumn,
    carried,
    count_by_source,
    list_counts,
    list_values,
    reordered,
    step_table,
)

SCHEMA = pa.schema(
    [("step", pa.int64()), ("ids", pa.list_(pa.int32())), ("texts", pa.large_list(pa.string()))]
)


def table() -> pa.Table:
    columns = {
        "step": [4, 5, 6],
        "ids": ListColumn(np.array([7, 8, 9]), [2, 0, 1]),
        "texts": ListColumn(["a", "b"], [0, 1, 1]),
    }
    return step_table(SCHEMA, columns)


def test_lists_are_cut_by_their_counts() -> None:
    assert table().to_pylist() == [
        {"step": 4, "ids": [7, 8], "texts": []},
        {"step": 5, "ids": [], "texts": ["a"]},
        {"step": 6, "ids": [9], "texts": ["b"]},
    ]


def test_values_and_counts_of_a_slice() -> None:
    last_two = table().slice(1)
    assert list_values(last_two, "ids").tolist() == [9]
    assert list_counts(last_two, "ids").tolist() == [0, 1]


def test_columns_are_carried_by_name() -> None:
    narrow = pa.schema([SCHEMA.field("ids"), ("other", pa.int64())])
    kept = carried(table(), narrow)
    assert list(kept) == ["ids"]
    assert step_table(narrow, {**kept, "other": [1, 2, 3]})["ids"].to_pylist() == [[7, 8], [], [9]]


def test_items_are_counted_by_step_and_source() -> None:
    steps = np.array([0, 0, 1], np.int64)
    sources = np.array([1, 1, 0], np.int32)
    counts = count_by_source(steps, sources, num_steps=3, num_sources=2)
    assert counts.values.tolist() == [0, 2, 1, 0, 0, 0]
    assert counts.counts == [2, 2, 2]
    weights = np.array([5, 6, 7], np.int64)
    sums = count_by_source(steps, sources, 3, 2, weights)
    assert sums.values.tolist() == [0, 11, 7, 0, 0, 0]


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_lists_come_in_another_order(dtype: type) -> None:
    values = np.array([7, 8, 9, 5, 6], dtype)
    lengths = np.array([2, 0, 1, 2], np.int32)
    moved = reordered(values, lengths, np.array([3, 1, 0, 2], np.int64))
    assert moved.tolist() == [5, 6, 7, 8, 9]
    assert moved.dtype == dtype


def test_no_list_in_another_order_keeps_its_type() -> None:
    nothing = reordered(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int64))
    assert (nothing.tolist(), nothing.dtype) == ([], np.int32)
