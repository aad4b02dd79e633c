"""Rows of a CSV file -> JSON text: an object with the header's names, and text as values.

prompt,completion
"a, b",             ->  {"prompt": "a, b", "completion": ""}
a,b,c               ->  not readable: it has more fields than the header, and is rejected
"""

from __future__ import annotations

import pyarrow as pa
from pyarrow import csv

from miles.data.files import csv_scan
from miles.data.files.csv_scan import Header
from miles.data.files.row_json import UNREADABLE_ROW, table_to_json


def block_to_json(block: bytes, header: Header) -> list[bytes]:
    """Return each row in the bytes of a row group as a JSON object in UTF-8."""
    if not block:
        return []
    try:
        return table_to_json(_parsed(block, header))
    except pa.ArrowInvalid:  # one row has too many fields or too few, or is not UTF-8
        rows = csv_scan.split_rows(block, header.delimiter)
        if len(rows) == 1:
            return [UNREADABLE_ROW]
        payloads = []
        for row in rows:
            payloads += block_to_json(row, header)
        return payloads


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
