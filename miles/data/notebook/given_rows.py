"""Rows in any form that `source=` takes -> paths of files, which all that follows reads.

    "rows.jsonl", Path("rows"), ["a/*.parquet", Path("b.jsonl")]     those paths
    [{"messages": …}, …], an iterator of dicts                       $MILES_CACHE/rows-…/….jsonl
    a data frame, an Arrow table or stream, datasets.Dataset, …      $MILES_CACHE/rows-…/….parquet

The rows keep the order in which they come: that of the list or iterator, of the frame's rows
(whatever its index says), of a `datasets.Dataset` behind its indices, and of the blocks of a
`ray.data.Dataset`, which is executed once with `preserve_order`.

None of the libraries is imported to find out what an object is: its type's module tells.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO

import pyarrow as pa

from miles.common.shown import shown
from miles.data.notebook import kept_rows
from miles.data.notebook.row_lines import write_lines
from miles.data.notebook.row_tables import GROUP_ROWS, write_table
from miles.errors import ConfigError, SourceError

Write = Callable[[BinaryIO], None]

EXPECTED = (
    "a path or URL, a list of them, a list or iterator of dicts, a data frame (pandas, Polars), an "
    "Arrow table, a datasets.Dataset, or a ray.data.Dataset"
)
ALL = "all"


def paths_in(source: Any) -> tuple[str, ...] | None:
    """Return the paths that a source gives; None where it gives rows.

    Raises:
        ConfigError: a list of both.
    """
    if source is None:
        return ()
    if isinstance(source, str | os.PathLike):
        return (_path(source),)
    if not isinstance(source, Sequence) or not source:
        return None

    are_paths = [isinstance(item, str | os.PathLike) for item in itertools.islice(source, 2)]
    if not any(are_paths):
        return None
    for number, item in enumerate(source):
        if not isinstance(item, str | os.PathLike):
            raise ConfigError(
                f"source[{number}] is {shown(item)} ({type(item).__name__}) among paths; give a "
                "list of paths, or a list of dicts"
            )
    return tuple(map(_path, source))


def file_of(source: Any, split: str | None = None) -> str:
    """Write the rows of a source into a file of the cache. Return its path.

    Args:
        source: gives rows, no paths. An iterator is read to its end.
        split: of a DatasetDict: names with `+` between them, or "all"; None: train.

    Raises:
        ConfigError: an object of a kind that is not known, or a split of one that has none.
        SourceError: a row that is no dict, a value that has no place in a file, or no row.
        WriteError: the cache's disk is full, or cannot be written.
    """
    kind = _kind_of(source)
    if kind == "datasets.DatasetDict":
        return _kept(_chosen_splits(source, split))
    if split is not None:
        raise ConfigError(
            f"split={split!r}: the rows given as source= have no splits; choose them yourself, or "
            "leave split out"
        )
    return _kept([source])


def _path(source: str | os.PathLike[Any]) -> str:
    """Return a path as text. One of a store, as of universal_pathlib, is its URL."""
    if isinstance(source, str):
        return source
    text = str(source) if "://" in str(source) else os.fspath(source)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    return text


def _kind_of(source: Any) -> str:
    """Return which library's object a source is, by the names of its type and that type's bases."""
    for base in type(source).__mro__:
        root = base.__module__.split(".")[0]
        name = f"{root}.{base.__name__}"
        if name in _KINDS:
            return _KINDS[name]
        if base.__module__.startswith("ray.data") and base.__name__ == "Dataset":
            return "ray.data.Dataset"
    return ""


_KINDS = {
    "pandas.DataFrame": "pandas.DataFrame",
    "polars.DataFrame": "polars.DataFrame",
    "polars.LazyFrame": "polars.LazyFrame",
    "datasets.Dataset": "datasets.Dataset",
    "datasets.IterableDataset": "datasets.IterableDataset",
    "datasets.DatasetDict": "datasets.DatasetDict",
    "datasets.IterableDatasetDict": "datasets.DatasetDict",
}
"""Library and class -> how it is read."""


def _kept(sources: Sequence[Any]) -> str:
    """Write the rows of sources, end to end, into a file of the cache. Return its path."""
    tables = [_table_of(source) for source in sources]
    schemas = [table[0] for table in tables if table is not None]
    if len(schemas) == len(tables) and all(schema.equals(schemas[0]) for schema in schemas):
        batches = itertools.chain.from_iterable(table[1] for table in tables if table is not None)
        return kept_rows.keep(".parquet", partial(write_table, schemas[0], batches))
    rows = itertools.chain.from_iterable(map(_dicts_of, sources))
    return kept_rows.keep(".jsonl", partial(write_lines, rows))


_Table = tuple[pa.Schema, Iterable[pa.RecordBatch]]


def _table_of(source: Any) -> _Table | None:
    """Return the rows of a table, in its order; None where they are taken as dicts."""
    kind = _kind_of(source)
    if kind == "pandas.DataFrame":
        return _pandas_table(source)
    if kind.startswith("datasets."):
        return _datasets_table(source)
    if kind == "ray.data.Dataset":
        return _ray_table(source)
    if kind == "polars.LazyFrame":
        source = _collected(source)
    if isinstance(source, pa.StructArray):
        source = pa.RecordBatch.from_struct_array(source)
    if isinstance(source, pa.RecordBatch):
        source = pa.Table.from_batches([source])

    # Arrow's own protocol: tables and readers of pyarrow, Polars, DuckDB and others have it.
    if not hasattr(source, "__arrow_c_stream__"):
        return None
    try:
        reader = pa.RecordBatchReader.from_stream(source)
    except (pa.ArrowException, TypeError) as error:
        raise SourceError(
            f"source=: the rows of this {type(source).__name__} cannot be taken as an Arrow table: "
            f"{error}. A single column is none: give the whole frame; paths are given as a list"
        ) from error
    return reader.schema, reader


def _collected(frame: Any) -> Any:
    """Return the result of a lazy frame of Polars.

    Raises:
        SourceError: its query fails.
    """
    try:
        return frame.collect()
    # Polars has exceptions of its own for columns, types and files.
    except Exception as error:
        cause = str(error).strip().split("\n")[0]
        raise SourceError(
            f"source=: the query of the LazyFrame fails, {type(error).__name__}: {cause}"
        ) from error


def _pandas_table(frame: Any) -> _Table | None:
    """Return a data frame without its index; None where a column's values share no Arrow type.

    Raises:
        SourceError: two columns have one name.
    """
    names = [str(name) for name in frame.columns]
    for name in names:
        if names.count(name) > 1:
            raise SourceError(
                f"source=: column {shown(name)} is there {names.count(name)} times; rename them, or "
                "leave one out"
            )
    try:
        table = pa.Table.from_pandas(frame, preserve_index=False)
    # Those of Arrow are among them, and those with which it refuses sparse columns and others.
    except (ValueError, TypeError, NotImplementedError):
        return None
    return table.schema, table.to_batches()


def _datasets_table(source: Any) -> _Table | None:
    """Return the rows of a Dataset or IterableDataset.

    None where their columns are not known, or where a function of the user's makes each row.
    """
    chosen = (getattr(source, "format", None) or {}).get("columns")
    if chosen is not None and set(chosen) < set(source.column_names):
        source = source.select_columns(chosen)
    features = source.features
    has_own_format = (getattr(source, "format", None) or {}).get("type") == "custom"
    if features is None or has_own_format:
        return None
    schema = features.arrow_schema
    tables = source.with_format("arrow").iter(batch_size=GROUP_ROWS)
    return schema, itertools.chain.from_iterable(table.to_batches() for table in tables)


def _ray_table(source: Any) -> _Table:
    """Return the rows of a Ray data set, executed once, its blocks in their order."""
    options = source.context.execution_options
    before = options.preserve_order
    options.preserve_order = True
    try:
        rows = source.materialize()
    finally:
        options.preserve_order = before

    def batches() -> Iterator[pa.RecordBatch]:
        # Ray's executor fills its own queue ahead; each batch is a block, as it lies in the store.
        for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from table.to_batches()

    # A block in which a column is null throughout says nothing of its type.
    schemas = dict.fromkeys(batch.schema.remove_metadata() for batch in batches() if batch.num_rows)
    if not schemas:
        raise SourceError("source= has no row: the ray.data.Dataset is empty")
    return pa.unify_schemas(list(schemas), promote_options="permissive"), batches()


def _dicts_of(source: Any) -> Iterator[Any]:
    """Return the rows of anything that gives dicts, in its order."""
    if _kind_of(source) == "pandas.DataFrame":
        return _pandas_dicts(source)
    if not isinstance(source, bytes | bytearray | Mapping):
        with contextlib.suppress(TypeError):
            return iter(source)
    hint = ""
    if isinstance(source, Mapping):
        hint = ". Rows in columns are pandas.DataFrame(...) or pyarrow.table(...); a row is [{...}]"
    raise ConfigError(
        f"source= must be {EXPECTED}, not {shown(source)} ({type(source).__name__}){hint}"
    )


def _pandas_dicts(frame: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data frame; what is missing in one (NaN) is null, as in its table."""
    for begin in range(0, len(frame), GROUP_ROWS):
        for row in frame.iloc[begin : begin + GROUP_ROWS].to_dict("records"):
            yield {str(key): None if _is_missing(value) else value for key, value in row.items()}


def _is_missing(value: Any) -> bool:
    """Return whether a value is NaN, or pandas' NA or NaT."""
    is_nan = isinstance(value, float) and math.isnan(value)
    return is_nan or type(value).__name__ in ("NAType", "NaTType")


def _chosen_splits(source: Mapping[str, Any], split: str | None) -> list[Any]:
    """Return the splits of a DatasetDict that are asked for, in the order of the words.

    Raises:
        ConfigError: there is none of that name; or none is asked for, and none is called train.
    """
    if not source:
        raise ConfigError("source= has no row: the DatasetDict has no split")
    if split == ALL or (split is None and len(source) == 1):
        return list(source.values())
    names = [name.strip() for name in (split or "train").split("+")]
    missing = [name for name in names if name not in source]
    if missing:
        raise ConfigError(
            f"split={split!r}: the DatasetDict has no split {missing[0]!r}: its splits are "
            f"{', '.join(map(str, source))}. Name one, several as 'a+b', or 'all'"
        )
    return [source[name] for name in names]
