"""Row shapes: how the rows of a source are laid out, detected once from the first of them.

    first rows   {"question": "2+2?", "answer": "4", "text": null}, …  up to 100
    fitting      messages 0, alpaca 0, prompt_completion 100, text 0
    ->           RowFormat("prompt_completion"), in columns prompt: question, completion: answer

A row fits a shape where each of the shape's main columns is filled: text or a list, and not empty.
Null is not filled: Parquet gives every row every column. The shape that most rows fit is taken; of
equals, the first in `MAIN_FIELDS`.

Where the user named a column, only that one is looked at for its field; a shape that the user named
is not doubted. Every other field is looked for row by row under the usual names below, and the
first that is not null is taken: files of one source may call their columns differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from miles.data.config import ROW_FIELDS, RowFormat, SourceConfig
from miles.errors import ConfigError, SourceError

FIRST_ROWS = 100
"""Rows of a source that are looked at."""

MAIN_FIELDS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Shape -> the fields that every row of it has. The order of the shapes decides between equals."""

USUAL_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system_prompt", "system"),
    "tools": ("tools",),
    "template_kwargs": ("chat_template_kwargs",),
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response"),
    "history": ("history",),
    "text": ("text",),
}
"""Field -> where it is looked for. A prompt and its completion are a pair: `USUAL_PAIRS`."""

USUAL_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "answer"),
    ("query", "response"),
    ("input", "output"),
)
"""Columns of a prompt and its completion; the first pair without a null is taken."""

_SHARED_FIELDS = ("system", "tools", "template_kwargs")
"""Fields that several shapes have, and that do not tell them apart."""


def column_of(field: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """Return the column of a row that holds a field of `USUAL_COLUMNS`.

    Args:
        columns: the ones that the user named: `RowFormat.columns`.

    Returns:
        None: there is no such column, or it is null.
    """
    named = columns.get(field)
    for name in USUAL_COLUMNS[field] if named is None else (named,):
        if row.get(name) is not None:
            return name
    return None


def possible_columns(field: str, columns: Mapping[str, str]) -> tuple[str, ...]:
    """Return the columns where a field of `USUAL_COLUMNS` is looked for, in order."""
    named = columns.get(field)
    return USUAL_COLUMNS[field] if named is None else (named,)


def pair_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the columns of a row that hold a prompt and its completion.

    Returns:
        None: there is no pair without a null.
    """
    for prompt, completion in USUAL_PAIRS:
        pair = columns.get("prompt", prompt), columns.get("completion", completion)
        if row.get(pair[0]) is not None and row.get(pair[1]) is not None:
            return pair
    return None


def describe_pairs(columns: Mapping[str, str]) -> str:
    """Return the pairs of columns that `pair_of` looks for, for an error: "a and b or a and c"."""
    pairs = [
        f"{columns.get('prompt', prompt)} and {columns.get('completion', completion)}"
        for prompt, completion in USUAL_PAIRS
    ]
    return " or ".join(dict.fromkeys(pairs))


def known_columns(format: RowFormat) -> frozenset[str]:
    """Return every column from which a row of the format could be read."""
    names = set(format.columns.values())
    names.update(*USUAL_COLUMNS.values(), *USUAL_PAIRS)
    return frozenset(names)


def columns_of_shape(format: RowFormat) -> frozenset[str]:
    """Return every column from which a row of the format's shape could be read."""
    names = set(format.columns.values())
    for field in ROW_FIELDS[format.shape]:
        names.update(USUAL_COLUMNS.get(field, ()))
    if format.shape == "prompt_completion":
        names.update(*USUAL_PAIRS)
    return frozenset(names)


def detect_format(
    source: SourceConfig, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]
) -> RowFormat:
    """Decide the shape of a source's rows.

    Args:
        source: `source.format` holds what the user named.
        rows: the first rows, with at least the columns of `known_columns`.
        columns: all columns of those rows, for the error.

    Returns:
        `source.format` with a shape, and with those named columns that are fields of the shape.

    Raises:
        ConfigError: the named columns are not fields of one shape.
        SourceError: no row fits any shape.
    """
    format = source.format
    if format.shape != "auto":
        return format

    shapes = _possible_shapes(source)
    num_fitting: dict[str, int] = {}
    for shape in shapes:
        num_fitting[shape] = sum(_fits(row, shape, format.columns) for row in rows)
    shape = max(num_fitting, key=lambda name: num_fitting[name])  # the first of equals
    if num_fitting[shape] == 0:
        expected = [_expected(shape, format.columns) for shape in shapes]
        raise SourceError(
            f"source {source.name!r}: which columns hold its rows is not clear. The first "
            f"{len(rows)} rows have {', '.join(columns) or 'no columns'}; expected columns that "
            f"hold text or lists, for {', or '.join(expected)}. Name them: --input-key COLUMN for "
            'messages, --column-names \'{"prompt": "COLUMN", "completion": "COLUMN"}\' for others; '
            "or give their shape with --row-shape, which drops the rows that do not have it"
        )

    named = {field: name for field, name in format.columns.items() if field in ROW_FIELDS[shape]}
    return replace(format, shape=shape, columns=named)


def find_columns(format: RowFormat, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return field -> column, from the first row where each field of the shape is not null.

    The fields are in the order of `ROW_FIELDS`; one that is null in all rows is left out.
    """
    by_field: dict[str, str] = {}
    for row in rows:
        by_field = _columns(row, format.shape, format.columns) | by_field
    return {field: by_field[field] for field in ROW_FIELDS[format.shape] if field in by_field}


def _possible_shapes(source: SourceConfig) -> list[str]:
    """Return the shapes that have all fields whose columns the user named.

    Raises:
        ConfigError: there is none.
    """
    named = [field for field in source.format.columns if field not in _SHARED_FIELDS]
    shapes = [shape for shape in MAIN_FIELDS if set(named) <= set(ROW_FIELDS[shape])]
    if not shapes:
        known = [f"{shape} ({', '.join(fields)})" for shape, fields in ROW_FIELDS.items()]
        raise ConfigError(
            f"source {source.name!r}: --column-names (or --input-key) names {', '.join(named)}, "
            f"which are not fields of one row shape; expected fields of one of {'; '.join(known)}"
        )
    return shapes


def _columns(row: Mapping[str, Any], shape: str, columns: Mapping[str, str]) -> dict[str, str]:
    """Return field -> column of one row."""
    by_field = {}
    pair = pair_of(row, columns) if shape == "prompt_completion" else None
    if pair is not None:
        by_field["prompt"], by_field["completion"] = pair

    for field in ROW_FIELDS[shape]:
        column = column_of(field, row, columns) if field in USUAL_COLUMNS else None
        if column is not None:
            by_field[field] = column
    return by_field


def _fits(row: Mapping[str, Any], shape: str, columns: Mapping[str, str]) -> bool:
    by_field = _columns(row, shape, columns)
    values = [row[by_field[field]] if field in by_field else None for field in MAIN_FIELDS[shape]]

    if shape == "messages" and isinstance(values[0], str):
        return values[0].lstrip().startswith("[")  # a list as JSON text, not a conversation's name
    if shape in ("alpaca", "text"):
        return all(isinstance(value, str) and value for value in values)
    return all(isinstance(value, (str, list)) and value for value in values)


def _expected(shape: str, columns: Mapping[str, str]) -> str:
    """Return a shape and its columns, for an error: "alpaca: instruction and output/response"."""
    if shape == "prompt_completion":
        return f"{shape}: {describe_pairs(columns)}"
    names = ["/".join(possible_columns(field, columns)) for field in MAIN_FIELDS[shape]]
    return f"{shape}: {' and '.join(names)}"
