"""The other files of a source: do their first rows have the shape of the first file's?

    a.jsonl  messages     b.jsonl  messages     c.jsonl  prompt, completion   ->  c.jsonl is named

The first file with rows decides the shape, as its order in the manifest says. A few others are
looked at, whatever their number: of 100 files the 25th, 50th, 75th and last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from miles.data.config import RowFormat, SourceConfig
from miles.data.files.file import File
from miles.data.files.first_rows import first_rows
from miles.data.files.row_columns import known_columns
from miles.data.files.row_shapes import MAIN_FIELDS, count_shapes, detect_format
from miles.errors import MilesError, SourceError

NUM_FILES = 4
"""Files that are looked at beside the first."""
_MAX_COLUMNS = 10


def require_one_shape(
    source: SourceConfig, format: RowFormat, found: Mapping[str, str], files: Sequence[File]
) -> None:
    """Refuse a source whose later files have rows of another shape than the first.

    A file that has the first one's columns, if without values, has its shape.

    Args:
        source: as the user gave it; a shape that the user named is not doubted.
        format: that the first file's rows have.
        found: field -> column in the first file's rows.
        files: of the source.

    Raises:
        SourceError: there is such a file, or none of its first rows can be read.
    """
    if source.format.shape != "auto":
        return
    main = {found.get(field) for field in MAIN_FIELDS[format.shape]}
    first, *others = _looked_at(files)
    for file in others:
        rows, columns = first_rows(file, known_columns(format), any_needed=True)
        if main.issubset(columns) or count_shapes(rows, format.columns, [format.shape]):
            continue

        named = ", ".join(columns[:_MAX_COLUMNS]) or "no columns"
        raise SourceError(
            f"source {source.name!r}: its files are not of one shape: the rows of {first.path} are "
            f"of shape {format.shape}, and the first {len(rows)} rows of {file.path} are not: they "
            f"have {named}. Give them as two sources (--prompt-data ONE PATH TWO PATH), leave that "
            f"file out, or give --row-shape {format.shape}, which drops the rows that do not have "
            "it"
        )


def with_hint(error: SourceError, source: SourceConfig, files: Sequence[File]) -> SourceError:
    """Return the error of a first file that has no known shape, with what others have.

    Args:
        error: that names the first file.
        source: as the user gave it.
        files: of the source.
    """
    _, *others = _looked_at(files)
    for file in others:
        try:
            rows, columns = first_rows(file, known_columns(source.format), any_needed=True)
            shape = detect_format(source, rows, columns).shape
        except MilesError:
            continue
        return SourceError(
            f"{error}. The rows of {file.path} are of shape {shape}: if the other file holds no "
            "rows, leave it out"
        )
    return error


def _looked_at(files: Sequence[File]) -> list[File]:
    """Return the first file with rows, and a few others at even distances up to the last."""
    with_rows = [file for file in files if file.num_rows]
    num_others = min(NUM_FILES, len(with_rows) - 1)
    places = [(len(with_rows) - 1) * (part + 1) // num_others for part in range(num_others)]
    return [with_rows[0], *(with_rows[place] for place in places)]
