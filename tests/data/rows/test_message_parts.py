"""Where a Parquet file of messages ends depends on its rows alone."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from miles.data.rows.message_parts import PartLimits, PartMaker
from miles.data.step_schemas import MESSAGES


def rows(num_rows: int, text: str = "a") -> pa.Table:
    return pa.Table.from_pylist([{"text": text}] * num_rows, schema=MESSAGES)


def sizes(added: list[pa.Table], limits: PartLimits) -> list[list[int]]:
    """Return the row groups of the files that come of tables, for each file."""
    maker = PartMaker(limits)
    contents = []
    for table in added:
        maker.add(table)
        if maker.is_full:
            contents.append(maker.finish())
    contents.append(maker.finish())

    files = []
    for content in contents:
        if content is not None:
            metadata = pq.read_metadata(pa.BufferReader(content))
            groups = range(metadata.num_row_groups)
            files.append([metadata.row_group(number).num_rows for number in groups])
    return files


def test_a_file_is_full_of_rows_or_of_bytes() -> None:
    limits = PartLimits(part_rows=5)
    assert sizes([rows(3), rows(3), rows(0), rows(4)], limits) == [[3, 3], [4]]
    assert sizes([rows(0)], limits) == []

    long = "".join(map(str, range(1000)))
    limits = PartLimits(part_bytes=1000)
    assert sizes([rows(1), rows(1, long), rows(1)], limits) == [[1, 1], [1]]


def test_a_row_group_is_small() -> None:
    assert sizes([rows(9)], PartLimits(group_rows=4)) == [[4, 4, 1]]
