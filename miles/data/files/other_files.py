"""The files of a source behind its first one: whether their rows have the same shape.

    a.jsonl  {"messages": […]}      ->  messages
    b.jsonl  {"messages": […]}          fits
    c.jsonl  {"question": …, …}         refused: no row fits, and all fit prompt_completion

A few files are looked at, spread over the source, the last among them. One whose rows fit no shape
at all is no reason to refuse: its rows are dropped, and counted, as any others that cannot be used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from miles.data.config import RowFormat, SourceConfig
from miles.data.files.file import File
from miles.data.files.first_rows import first_rows
from miles.data.files.row_columns import known_columns
from miles.data.files.row_shapes import MAIN_FIELDS, count_shapes, find_columns, fits
from miles.errors import SourceError

_MOST_FILES = 3


def require_one_shape(
    source: SourceConfig, format: RowFormat, first: File, files: Sequence[File]
) -> None:
    """Refuse a source with a file whose rows have another shape than those of its first file.

    Args:
        format: that was detected from the first file; what the user names is not doubted.
        first: the first file with rows.
        files: all files of the source.

    Raises:
        SourceError: the error names both files, their shapes and columns; or none of the first rows
            of a file can be read.
    """
    if source.format.shape != "auto":
        return
    for file in some_others(first, files):
        rows, _ = first_rows(
            file, known_columns(source.format), any_needed=True, transform=source.format.transform
        )
        if any(fits(row, format.shape, source.format.columns) for row in rows):
            continue
        shape = _likeliest_shape(source, rows)
        if not shape:
            continue

        columns = ", ".join(find_columns(RowFormat(shape), rows).values())
        raise SourceError(
            f"source {source.name!r} has rows of two shapes: those of {first.path} are "
            f"{format.shape}, and those of {file.path} are {shape} ({columns}). Make them two "
            "sources: --prompt-data NAME PATH NAME PATH; or, to drop the rows that do not have it, "
            f"name one: --row-shape {format.shape}"
        )


def other_shape(source: SourceConfig, first: File, files: Sequence[File]) -> str:
    """Return a sentence on a file that has rows of a known shape, where the first one has none.

    It is empty where there is no such file, or none was found among those that are looked at.
    """
    for file in some_others(first, files):
        # A file that cannot be read is no reason to say less of the first one.
        rows, _ = first_rows(file, known_columns(source.format), transform=source.format.transform)
        shape = _likeliest_shape(source, rows)
        if shape:
            return (
                f"Another file of the source, {file.path}, has rows of the shape {shape}: if "
                f"{first.path} holds no rows, leave it out"
            )
    return ""


def _likeliest_shape(source: SourceConfig, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the shape that most rows of a source count for; "" where none counts for any."""
    counts = count_shapes(rows, source.format.columns, tuple(MAIN_FIELDS))
    return max(counts, key=lambda name: counts[name]) if counts else ""


def some_others(first: File, files: Sequence[File]) -> list[File]:
    """Return up to `_MOST_FILES` files with rows behind the first one, spread, and the last."""
    others = [file for file in files if file.num_rows and file.path != first.path]
    num_looked_at = min(_MOST_FILES, len(others))
    last = [(number + 1) * len(others) // num_looked_at - 1 for number in range(num_looked_at)]
    return [others[number] for number in last]
