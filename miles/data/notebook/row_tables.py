"""Rows in columns -> a Parquet file, in batches, the same for the same rows.

    text as large_string, string_view, dictionary    ->  string          one type a meaning, so that
    lists as large_list, fixed_size_list, list_view  ->  list            pandas, Polars and Arrow
    batches of any size                              ->  row groups of `GROUP_ROWS`     give one file
    what pandas and `datasets` note about columns    ->  left out

Numbers keep their width, and times and bytes their type: what of them is read is decided where any
Parquet file is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from miles.data.files.arrow_types import is_any_list, is_plain
from miles.errors import SourceError

GROUP_ROWS = 1_000
_COMPRESSION = "zstd"


def write_table(schema: pa.Schema, batches: Iterable[pa.RecordBatch], file: BinaryIO) -> None:
    """Write batches of rows as Parquet.

    Args:
        schema: of the batches.
        batches: taken one by one.
        file: to write to.

    Raises:
        SourceError: columns that Parquet has no place for, or no row at all.
    """
    plain = pa.schema([_plain_field(field) for field in schema])
    num_rows = 0
    try:
        with pq.ParquetWriter(file, plain, compression=_COMPRESSION) as writer:
            for group in _groups(_cast(batch, plain) for batch in batches):
                writer.write_table(group, row_group_size=GROUP_ROWS)
                num_rows += group.num_rows
    except pa.ArrowException as error:
        raise SourceError(
            f"source=: the table cannot be kept as Parquet: {error}. Leave that column out, or give "
            "the rows as a list of dicts"
        ) from error
    if not num_rows:
        raise SourceError("source= has no row: the table is empty")


def _cast(batch: pa.RecordBatch, plain: pa.Schema) -> pa.Table:
    """Return a batch with columns of plain types."""
    table = pa.Table.from_batches([batch])
    columns = []
    for field in plain:
        num_columns = table.schema.names.count(field.name)
        if num_columns > 1:
            raise pa.ArrowInvalid(f"column {field.name!r} is there {num_columns} times")
        if num_columns == 1:
            columns.append(_plain_column(table[field.name], field.type))
        else:  # a block of a Ray data set may lack a column
            columns.append(pa.chunked_array([pa.nulls(len(table), field.type)]))
    return pa.Table.from_arrays(columns, schema=plain)


def _plain_column(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if column.type == kind:
        return column
    if pa.types.is_run_end_encoded(column.type):
        column = pc.run_end_decode(column)
    if pa.types.is_dictionary(column.type) and _is_view(column.type.value_type):
        # pyarrow 26 takes nothing from a dictionary of views, as Polars has for categories.
        chunks = [_with_plain_words(chunk) for chunk in column.chunks]
        column = pa.chunked_array(chunks, pa.dictionary(column.type.index_type, pa.string()))
    if isinstance(column.type, pa.BaseExtensionType):
        storage = [chunk.storage for chunk in column.chunks]
        column = pa.chunked_array(storage, column.type.storage_type)
    return column.cast(kind)


def _is_view(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string_view(kind))


def _with_plain_words(column: pa.DictionaryArray) -> pa.DictionaryArray:
    """Return a dictionary of views of text as one of text."""
    return pa.DictionaryArray.from_arrays(column.indices, column.dictionary.cast(pa.string()))


def _groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the rows of tables in tables of `GROUP_ROWS` rows; the last one has what is left."""
    waiting: list[pa.Table] = []
    num_waiting = 0
    for table in tables:
        waiting.append(table)
        num_waiting += table.num_rows
        if num_waiting < GROUP_ROWS:
            continue

        rows = pa.concat_tables(waiting)
        num_whole = num_waiting - num_waiting % GROUP_ROWS
        for begin in range(0, num_whole, GROUP_ROWS):
            yield rows.slice(begin, GROUP_ROWS).combine_chunks()
        waiting = [rows.slice(num_whole)]
        num_waiting -= num_whole
    if num_waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def _plain_field(field: pa.Field) -> pa.Field:
    """Return a field of a plain type, without notes; it may be null."""
    return pa.field(field.name, plain_type(field.type))


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the same values that all kinds of tables share."""
    if isinstance(kind, pa.BaseExtensionType):
        return kind if is_plain(kind) else plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    for is_kind, plain in _SAME_VALUES:
        if is_kind(kind):
            return plain
    if is_any_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([_plain_field(kind.field(number)) for number in range(kind.num_fields)])
    if pa.types.is_map(kind):
        return pa.map_(plain_type(kind.key_type), plain_type(kind.item_type))
    return kind


_SAME_VALUES: tuple[tuple[Callable[[pa.DataType], bool], pa.DataType], ...] = (
    (pa.types.is_large_string, pa.string()),
    (pa.types.is_string_view, pa.string()),
    (pa.types.is_large_binary, pa.binary()),
    (pa.types.is_binary_view, pa.binary()),
)
