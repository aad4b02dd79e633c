"""What the rows of a source look like: found once from the first of them, where the user did not say.

    first rows   {"question": "2+2?", "answer": "4", "text": null}, …  up to 100
    fit          messages 0, alpaca 0, prompt_completion 100, text 0
    ->           RowFormat("prompt_completion"), in columns prompt: question, completion: answer

A row fits a shape where each of the shape's main columns is filled: text or a list, and not empty. Null is
not filled: Parquet gives every row every column. The shape that most rows fit is taken, of equals the first
of `MAIN_FIELDS`. A column that the user named is the only one looked at for its field, and a shape that the
user named is not doubted. What was not named is looked for row by row under the usual names below, the first
that is not null: files of one source may call their columns differently.
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
"""Shape -> the fields that no row of it can do without, in the order in which equals are preferred."""

USUAL_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system_prompt", "system"),
    "tools": ("tools",),
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response"),
    "history": ("history",),
    "text": ("text",),
}
"""Field -> where it is looked for. A prompt and its completion are found together: `USUAL_PAIRS`."""

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
"""Columns of a prompt and its completion; the first pair of which neither is null is taken."""

_SHARED_FIELDS = ("system", "tools")
"""Fields that say nothing of the shape."""


def column_of(field: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """The column of a row that holds a field of `USUAL_COLUMNS`; None: there is none, or it is null.

    Args:
        columns: those that were named: `RowFormat.columns`.
    """
    named = columns.get(field)
    if named is not None:
        return named if row.get(named) is not None else None
    for name in USUAL_COLUMNS[field]:
        if row.get(name) is not None:
            return name
    return None


def pair_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, str] | None:
    """The columns of a row that hold a prompt and its completion; None: not both are there, or one is null."""
    for prompt, completion in USUAL_PAIRS:
        pair = columns.get("prompt", prompt), columns.get("completion", completion)
        if row.get(pair[0]) is not None and row.get(pair[1]) is not None:
            return pair
    return None


def known_columns(format: RowFormat) -> frozenset[str]:
    """Every column that a row of the format could be read from: no other one has to be looked at."""
    usual = {name for names in (*USUAL_COLUMNS.values(), *USUAL_PAIRS) for name in names}
    return frozenset(usual | set(format.columns.values()))


def detect_format(
    source: SourceConfig, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]
) -> RowFormat:
    """Decides the shape of a source's rows.

    Args:
        source: `source.format` holds what the user named.
        rows: the first rows, with at least the columns of `known_columns`.
        columns: all columns of those rows, for the error.

    Returns:
        `source.format` with a shape, and with those named columns that are fields of the shape.

    Raises:
        ConfigError: the named columns are fields of no one shape.
        SourceError: no row fits any shape.
    """
    format = source.format
    if format.shape != "auto":
        return format
    telling = [field for field in format.columns if field not in _SHARED_FIELDS]
    shapes = [
        shape for shape in MAIN_FIELDS if all(field in ROW_FIELDS[shape] for field in telling)
    ]
    if not shapes:
        raise ConfigError(
            f"source {source.name!r}: --column-names (or --input-key) names {', '.join(telling)}, which are not fields "
            "of one row shape; expected fields of one of "
            + "; ".join(f"{shape} ({', '.join(fields)})" for shape, fields in ROW_FIELDS.items())
        )
    num_fitting = {
        shape: sum(_fits(row, shape, format.columns) for row in rows) for shape in shapes
    }
    shape = max(num_fitting, key=lambda name: num_fitting[name])  # the first of equals
    if num_fitting[shape] == 0:
        raise SourceError(
            f"source {source.name!r}: in which columns its rows are cannot be told. The first {len(rows)} rows have "
            f"{', '.join(columns) or 'no columns'}; expected columns that hold text or lists, for "
            + ", or ".join(_expected(shape, format.columns) for shape in shapes)
            + '. Name them: --input-key COLUMN for messages, --column-names \'{"prompt": "COLUMN", "completion": '
            '"COLUMN"}\' for others; or say with --row-shape what the rows are, to have those that are not dropped'
        )
    return replace(format, shape=shape, columns=_of_shape(format.columns, shape))


def find_columns(format: RowFormat, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Field -> column, for each field of the format's shape that is not null in one of the rows: of the first
    such row, in the order of `ROW_FIELDS`."""
    found: dict[str, str] = {}
    for row in rows:
        found = _columns(row, format.shape, format.columns) | found
    return {field: found[field] for field in ROW_FIELDS[format.shape] if field in found}


def _of_shape(columns: Mapping[str, str], shape: str) -> dict[str, str]:
    return {field: name for field, name in columns.items() if field in ROW_FIELDS[shape]}


def _columns(row: Mapping[str, Any], shape: str, columns: Mapping[str, str]) -> dict[str, str]:
    """Field -> column of one row."""
    pair = pair_of(row, columns) if shape == "prompt_completion" else None
    found = dict(zip(("prompt", "completion"), pair, strict=True)) if pair else {}
    for field in ROW_FIELDS[shape]:
        column = column_of(field, row, columns) if field in USUAL_COLUMNS else None
        if column is not None:
            found[field] = column
    return found


def _fits(row: Mapping[str, Any], shape: str, columns: Mapping[str, str]) -> bool:
    found = _columns(row, shape, columns)
    values = [row[found[field]] if field in found else None for field in MAIN_FIELDS[shape]]
    if shape == "messages" and isinstance(values[0], str):
        return values[0].lstrip().startswith("[")  # a list as JSON text, not a conversation's name
    if shape in ("alpaca", "text"):
        return all(isinstance(value, str) and value for value in values)
    return all(isinstance(value, (str, list)) and value for value in values)


def _expected(shape: str, columns: Mapping[str, str]) -> str:
    """`prompt_completion: prompt and completion`, with the column names that were looked for."""
    if shape == "prompt_completion":
        named = [columns.get(field) for field in MAIN_FIELDS[shape]]
        pairs = dict.fromkeys(
            (named[0] or prompt, named[1] or completion) for prompt, completion in USUAL_PAIRS
        )
        return (
            f"{shape}: {' or '.join(f'{prompt} and {completion}' for prompt, completion in pairs)}"
        )
    names = [
        (columns[field],) if field in columns else USUAL_COLUMNS[field]
        for field in MAIN_FIELDS[shape]
    ]
    return f"{shape}: {' and '.join('/'.join(alternatives) for alternatives in names)}"
