"""Row shapes: how the rows of a source are laid out, detected once from the first of them.

    first rows   {"question": "2+2?", "answer": "4", "text": null}, …  up to 100
    fitting      messages 0, alpaca 0, prompt_completion 100, …, text 0
    ->           RowFormat("prompt_completion"), in columns prompt: question, completion: answer

A row fits a shape where each of the shape's main columns is filled: text or a list, and not empty;
a number beside a text, too. Null is not filled: Parquet gives every row every column. The shape
that most rows fit is taken; of equals, the first in `MAIN_FIELDS`. Where that is none by the usual
columns, or `text`, a row counts for the strongest signs in it alone:

    1. the usual columns of messages, alpaca and prompt_completion, in any case
    2. their further columns; a preference; a transcript
    3. a column called text

Two readings of the second kind that train different text are refused, and so is a text beside which
a message's role stands, or a list of turns (`shape_hints`).

A shape that the user named is not doubted. Which column holds a field: `row_columns`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from miles.data.config import ROW_FIELDS, RowFormat, SourceConfig
from miles.data.files.row_columns import (
    USUAL_COLUMNS,
    USUAL_PAIRS,
    column_of,
    describe_pairs,
    name_in,
    pair_of,
    possible_columns,
    prompt_of,
    reasoning_of,
    with_usual_names,
)
from miles.data.files.shape_hints import closest, column_flag, in_place_of_text
from miles.data.files.turn_values import ROLE_KEYS, has_turns, is_transcript, is_turn
from miles.errors import ConfigError, SourceError

FIRST_ROWS = 100
"""Rows of a file that are looked at."""

MAIN_FIELDS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("chosen",),
    "transcript": ("transcript",),
    "text": ("text",),
}
"""Shape -> the fields that every row of it has. The order of the shapes decides between equals."""

_USUAL_SHAPES = ("messages", "alpaca", "prompt_completion")
_FURTHER_SHAPES = ("messages", "alpaca", "prompt_completion", "preference", "transcript")
_SHARED_FIELDS = ("system", "tools", "template_kwargs")
"""Fields that several shapes have, and that do not tell them apart."""


def detect_format(
    source: SourceConfig, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], file: str = ""
) -> RowFormat:
    """Decide the shape of a source's rows.

    Args:
        source: `source.format` holds what the user named.
        rows: the first rows, with at least the columns of `known_columns`.
        columns: all columns of those rows, for the error.
        file: from which they are, for the error.

    Returns:
        `source.format` with a shape, and with those named columns that are fields of the shape.

    Raises:
        ConfigError: the named columns are not fields of one shape.
        SourceError: no row fits any shape; or it is not clear which of two is meant.
    """
    format = source.format
    if format.shape != "auto":
        return format

    where = f"source {source.name!r}" + (f": {file}" if file else "")
    shapes = _possible_shapes(source)
    shape = _plain_shape(rows, format.columns, shapes)
    if shape is None:
        counts = count_shapes(rows, format.columns, shapes)
        if not counts:
            raise SourceError(_no_shape(where, rows, columns, format, shapes))
        shape = max(counts, key=lambda name: counts[name])  # the first of equals
        _require_no_stronger_sign(where, shape, rows, format.columns)
        _require_one_reading(where, shape, rows, format.columns, shapes)

    if shape == "messages" and "messages" not in format.columns:
        _require_no_ranking(where, rows)
    named = {field: name for field, name in format.columns.items() if field in ROW_FIELDS[shape]}
    return replace(format, shape=shape, columns=named)


def count_shapes(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], shapes: Sequence[str]
) -> dict[str, int]:
    """Return shape -> rows that count for it, in the order of `shapes`; only those that have any.

    Args:
        columns: the ones that the user named.
        shapes: the ones that are looked for.
    """
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(_readings(row, columns, shapes))
    return {shape: counts[shape] for shape in shapes if counts[shape]}


def fits(row: Mapping[str, Any], shape: str, columns: Mapping[str, str]) -> bool:
    """Return whether a row could be read by a shape, whatever else it could be.

    Args:
        columns: the ones that the user named.
    """
    return _fits(with_usual_names(row, columns), shape, columns)


def find_columns(format: RowFormat, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return field -> column, from the first row where each field of the shape is not null.

    The fields are in the order of `ROW_FIELDS`; one that is null in all rows is left out.
    """
    by_field: dict[str, str] = {}
    for row in rows:
        found = _columns(with_usual_names(row, format.columns), format.shape, format.columns)
        by_field = {field: name_in(row, column) for field, column in found.items()} | by_field
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


def _plain_shape(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], shapes: Sequence[str]
) -> str | None:
    """Return the shape that most rows fit as they are: by usual columns, with text or lists.

    Returns:
        None: there is none, or it is "text", beside which a row may have a stronger sign.
    """
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(shape for shape in shapes if _fits_plainly(row, shape, columns))
    shape = max(shapes, key=lambda name: counts[name])  # the first of equals
    return shape if counts[shape] and shape != "text" else None


def _fits_plainly(row: Mapping[str, Any], shape: str, columns: Mapping[str, str]) -> bool:
    if shape not in (*_USUAL_SHAPES, "text") or not _fits_usual(row, shape, columns):
        return False
    by_field = _columns(row, shape, columns)
    kinds = (str,) if shape in ("alpaca", "text") else (str, list)
    return all(isinstance(row[by_field[field]], kinds) for field in MAIN_FIELDS[shape])


def _readings(
    row: Mapping[str, Any], columns: Mapping[str, str], shapes: Sequence[str]
) -> list[str]:
    """Return the shapes that a row fits by the strongest signs in it."""
    row = with_usual_names(row, columns)
    usual = [name for name in _USUAL_SHAPES if name in shapes and _fits_usual(row, name, columns)]
    if usual:
        return usual
    further = [name for name in _FURTHER_SHAPES if name in shapes and _fits(row, name, columns)]
    if further:
        return further
    return ["text"] if "text" in shapes and _fits(row, "text", columns) else []


def _require_no_ranking(where: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse conversations whose last turn asks, and whose answer stands in a column chosen."""
    for row in rows:
        column = column_of("messages", row, {})
        turns = None if column is None else row[column]
        if not isinstance(turns, list) or not turns or not is_turn(turns[-1]):
            continue
        asks = any(turns[-1].get(key) in ("user", "human") for key in ROLE_KEYS)
        if asks and (is_turn(row.get("chosen")) or has_turns(row.get("chosen"))):
            raise SourceError(
                f"{where}: column {column} ends with a question, and column chosen holds its "
                f"preferred answer. Take both: --row-shape preference "
                f"{column_flag({'prompt': str(column)})}; or the conversation alone: "
                f"--input-key {column}"
            )


def _require_no_stronger_sign(
    where: str, shape: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]
) -> None:
    """Refuse texts beside which stands what makes them part of a conversation."""
    if shape != "text" or "text" in columns:
        return
    hint = in_place_of_text([row for row in rows if row.get("text")])
    if hint is not None:
        raise SourceError(
            f"{where}: {hint.found}. {hint.remedy}; to train column text alone: --row-shape text"
        )


def _require_one_reading(
    where: str,
    shape: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    shapes: Sequence[str],
) -> None:
    """Refuse rows that fit two shapes equally well, and train other text by one than by the
    other."""
    for row in rows:
        readings = _readings(row, columns, shapes)
        if readings[:2] == ["alpaca", "prompt_completion"]:  # alpaca has the pair, and more
            readings.remove("prompt_completion")
        named = with_usual_names(row, columns)
        usual = [name for name in readings if name in _USUAL_SHAPES]
        is_usual = any(_fits_usual(named, name, columns) for name in usual)
        if shape in readings and len(readings) > 1 and not is_usual:
            found = [_with_columns(row, name, columns) for name in readings]
            raise SourceError(
                f"{where}: its rows can be read in more than one way: {', or '.join(found)}. "
                f"Choose: --row-shape {' or '.join(readings)}"
            )


def _with_columns(row: Mapping[str, Any], shape: str, columns: Mapping[str, str]) -> str:
    """Return a shape and its main columns in a row: "preference (chosen)"."""
    found = find_columns(RowFormat(shape, _fields_of(shape, columns)), [row])
    return f"{shape} ({', '.join(found[field] for field in MAIN_FIELDS[shape])})"


def _fields_of(shape: str, columns: Mapping[str, str]) -> dict[str, str]:
    return {field: name for field, name in columns.items() if field in ROW_FIELDS[shape]}


def _columns(row: Mapping[str, Any], shape: str, columns: Mapping[str, str]) -> dict[str, str]:
    """Return field -> column of one row."""
    by_field: dict[str, str | None] = {}
    for field in ROW_FIELDS[shape]:
        if field in USUAL_COLUMNS:
            by_field[field] = column_of(field, row, columns)

    if "reasoning" in by_field:
        reasoning = reasoning_of(row, columns)
        by_field["reasoning"] = None if reasoning is None else reasoning[0]
    if shape == "prompt_completion":
        by_field["prompt"], by_field["completion"] = pair_of(row, columns) or (None, None)
    if shape == "preference":
        by_field["prompt"] = prompt_of(row, columns)
        if by_field["prompt"] != "instruction" and "input" not in columns:
            del by_field["input"]
    return {field: column for field, column in by_field.items() if column is not None}


def _fits_usual(row: Mapping[str, Any], shape: str, columns: Mapping[str, str]) -> bool:
    """Return whether a row fits a shape by the columns that are looked at first."""
    if not _fits(row, shape, columns):
        return False
    by_field = _columns(row, shape, columns)
    if shape == "prompt_completion":
        pair = by_field["prompt"], by_field["completion"]
        usual = [
            (columns.get("prompt", prompt), columns.get("completion", completion))
            for prompt, completion in USUAL_PAIRS
        ]
        return pair in usual
    return all(by_field[field] in possible_columns(field, columns) for field in MAIN_FIELDS[shape])


def _fits(row: Mapping[str, Any], shape: str, columns: Mapping[str, str]) -> bool:
    by_field = _columns(row, shape, columns)
    values = [row[by_field[field]] if field in by_field else None for field in MAIN_FIELDS[shape]]

    if shape == "messages":
        return _is_conversation(values[0])
    if shape == "preference":
        return _is_chosen(values[0], "prompt" in by_field)
    if shape == "transcript":
        return is_transcript(values[0]) or bool("transcript" in columns and values[0])
    if shape == "text":
        return isinstance(values[0], str) and bool(values[0])

    is_side = _is_text if shape == "alpaca" else _is_side
    has_text = any(isinstance(value, (str, list, dict)) for value in values)
    return has_text and all(map(is_side, values))


def _is_conversation(value: Any) -> bool:
    if isinstance(value, str):
        return value.lstrip().startswith("[")  # a list as JSON text, not a conversation's name
    return bool(value) and (isinstance(value, list) or has_turns(value))


def _is_chosen(value: Any, has_prompt: bool) -> bool:
    if isinstance(value, str) and value:
        return has_prompt or is_transcript(value) or has_turns(value)
    return has_turns(value) or is_turn(value)


def _is_text(value: Any) -> bool:
    return bool(value) if isinstance(value, str) else isinstance(value, (int, float))


def _is_side(value: Any) -> bool:
    """Return whether a value may be a prompt or a completion."""
    if isinstance(value, dict):
        return has_turns(value) or is_turn(value)
    return bool(value) if isinstance(value, list) else _is_text(value)


def _no_shape(
    where: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    format: RowFormat,
    shapes: Sequence[str],
) -> str:
    """Return the text of the error where no row fits a shape."""
    hint = closest(rows, columns)
    unclear = f"{where}: which columns hold its rows is not clear."
    found = f"The first {len(rows)} rows have {', '.join(columns) or 'no columns'}"
    if hint is not None:
        return f"{unclear} {hint.found}. {hint.remedy}. {found}"

    expected = [_expected(shape, format.columns) for shape in shapes]
    return (
        f"{unclear} {found}; expected columns that hold text or lists, for "
        f"{', or '.join(expected)}, or other names of docs/rows.md. Name them: --input-key COLUMN "
        'for messages, --column-names \'{"prompt": "COLUMN", "completion": "COLUMN"}\' for '
        "others; or give their shape with --row-shape, which drops the rows that do not have it"
    )


def _expected(shape: str, columns: Mapping[str, str]) -> str:
    """Return a shape and its columns, for an error: "alpaca: instruction and output/response"."""
    if shape == "prompt_completion":
        return f"{shape}: {describe_pairs(columns)}"
    names = ["/".join(possible_columns(field, columns)) for field in MAIN_FIELDS[shape]]
    return f"{shape}: {' and '.join(names)}"
