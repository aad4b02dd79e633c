"""Rows of a Ray data set, and rows that a function makes, through the real stream."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray.data

from miles.data.config import RowFormat, SourceConfig
from miles.data.notebook.given_rows import file_of
from miles.data.transforms import Transform
from tests.support.streams import config_of, demo_settings, follow, local, opened, seen, seen_of

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


MODULE = """
def turns_of(row):
    return [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]

def to_row(row):
    return None if row["n"] % 10 == 3 else {"messages": turns_of(row)} if row["n"] != 7 else row["x"]
"""


@pytest.mark.parametrize("kind", ["by name", "by value"])
def test_loaders_call_the_function(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw.jsonl"
    rows = [{"n": number, "q": f"{number}+2?", "a": str(number + 2)} for number in range(300)]
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows_of_a_user.py").write_text(MODULE)

    suffix = "!"

    def in_a_cell(row: dict[str, Any]) -> Any:
        if row["n"] % 10 == 3:
            return None
        answer = {"role": "assistant", "content": row["a"] + suffix}
        return [{"role": "user", "content": row["q"]}, answer] if row["n"] != 7 else row["x"]

    function: Any = "rows_of_a_user:to_row" if kind == "by name" else in_a_cell
    settings = demo_settings(tmp_path, batch_size=50, window_rows=100, num_epoch=1)
    source = SourceConfig("raw", (str(raw),), RowFormat(transform=Transform.of(function)))
    config = replace(config_of(settings), sources=(source,), max_bad_fraction=0.1)

    expected = [seen(step) for step in local(config)]
    with opened(config, str(tmp_path / "run")) as feed:
        assert [seen_of(*step) for step in follow(feed, config)] == expected
    rejects = [entry for step in expected for entry in step[3]]
    assert len(rejects) == 31
