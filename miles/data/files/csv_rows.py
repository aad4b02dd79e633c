"""Rows of a CSV file -> JSON text: an object with the header's names, and text as values.

prompt,completion
"a, b",             ->  {"prompt": "a, b", "completion": ""}
a,b,c               ->  not readable: it has more fields than the header, and is rejected
"""

from __future__ import annotations

import pyarrow as pa
from pyarrow import csv

from miles.common.counts import counted
from miles.data.files import csv_scan
from miles.data.files.csv_scan import Header
from miles.data.files.row_json import table_to_json
from miles.data.types import OTHER_FIELDS_ROW, UNREADABLE_ROW


def block_to_json(block: bytes, header: Header) -> list[bytes]:
    """Return each row in the bytes of a row group as a JSON object in UTF-8."""
    if not block:
        return []
    try:
        return table_to_json(_parsed(block, header))
    except pa.ArrowInvalid:  # one row has too many fields or too few, or is not UTF-8
        rows = csv_scan.split_rows(block, header.delimiter)
        if len(rows) == 1:
            return [_unreadable(rows[0], header)]
        payloads = []
        for row in rows:
            payloads += block_to_json(row, header)
        return payloads


def _unreadable(row: bytes, header: Header) -> bytes:
    """Return what stands for a row that cannot be read."""
    outside = row.split(b'"')[::2]  # of quotation marks
    num_fields = sum(part.count(header.delimiter.encode()) for part in outside) + 1
    num_columns = len(header.names)
    if num_fields == num_columns:
        return UNREADABLE_ROW
    fields = "1 field" if num_fields == 1 else f"{num_fields:,} fields"
    columns = counted(num_columns, "column")
    return OTHER_FIELDS_ROW + f"{fields}, and the header has {columns}".encode()


def _parsed(block: bytes, header: Header) -> pa.Table:
    return csv.read_csv(
        pa.py_buffer(block),
        read_options=csv.ReadOptions(
            column_names=list(header.names), use_threads=False, block_size=len(block) + 1
        ),
        parse_options=csv.ParseOptions(delimiter=header.delimiter, newlines_in_values=True),
        convert_options=csv.ConvertOptions(
            column_types={name: pa.string() for name in header.names}, strings_can_be_null=False
        ),
    )
