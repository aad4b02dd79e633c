"""Rows of a Ray data set, and rows that a function makes, through the real stream."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data

from miles.data.notebook.given_rows import file_of

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"{number}+2?"},
            {"role": "assistant", "content": str(number + 2)},
        ],
        "note": "x" if number > 250 else None,  # null throughout in the first blocks
    }
    for number in range(300)
]


def _late_first(table: pa.Table) -> pa.Table:
    """Have the first block come last, where the order is not kept."""
    if table["messages"][0].as_py() == ROWS[0]["messages"]:
        time.sleep(1)
    return table


def test_a_ray_data_set_keeps_the_order_of_its_blocks() -> None:
    blocks = [pa.Table.from_pylist(ROWS[begin : begin + 50]) for begin in range(0, 300, 50)]
    rows = ray.data.from_arrow(blocks).map_batches(
        _late_first, batch_format="pyarrow", batch_size=None
    )
    before = rows.context.execution_options.preserve_order

    path = file_of(rows)
    assert _read(path) == ROWS
    assert path == file_of(pa.Table.from_pylist(ROWS))
    assert rows.context.execution_options.preserve_order == before


def _read(path: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    assert Path(path).suffix == ".parquet"
    return json.loads(json.dumps(pq.read_table(path).to_pylist()))
