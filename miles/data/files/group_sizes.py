"""The sizes of row groups, and the files that are too coarse to train on because of them.

A row group is read as a whole, and a compressed JSON file from its start. A window of the shuffled
order takes rows from many places, so a large unit is read again for many windows:

    row group of 100,000 rows, windows of 10,000 rows  ->  read about 10 times an epoch: refused
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from miles.data.files.file import File
from miles.data.files.manifest import Manifest
from miles.errors import SourceError

MAX_GROUP_WINDOWS = 4
"""A row group that fills more windows than this is refused: each of them would read it again."""
SMALL_GROUP_ROWS = 1_000
"""A row group of no more rows is accepted for any window. `prepare` and the index of a JSON file
make such row groups."""


def largest_read_rows(manifest: Manifest) -> int:
    """Return the rows of the largest row group or compressed JSON file."""
    largest = 0
    for source in manifest.sources:
        for file in source.files:
            largest = max(largest, *(num_rows for _, num_rows in _units(file)))
    return largest


def require_small_groups(
    manifest: Manifest, window_rows: int, source_window_rows: Sequence[int] | None = None
) -> None:
    """Refuse a file whose rows would be read again for many windows.

    Args:
        window_rows: rows of a window.
        source_window_rows: for each source of a weighted mixture, the rows that a window takes of
            it; None: there are no weights, and a window may be of one source.

    Raises:
        SourceError: there is such a file; the error names it and says what to do.
    """
    num_windows = -(-manifest.num_rows // window_rows)
    by_source = source_window_rows or [window_rows] * len(manifest.sources)

    for source, own_rows in zip(manifest.sources, by_source, strict=True):
        for file in source.files:
            unit, unit_rows = max(_units(file), key=lambda unit: unit[1])
            if unit_rows <= max(MAX_GROUP_WINDOWS * own_rows, SMALL_GROUP_ROWS):
                continue

            num_reads = -(-unit_rows // own_rows)
            if file.compression is not None:
                num_reads = min(num_windows, len(file.row_groups))
            enough_rows = -(-unit_rows * window_rows // (MAX_GROUP_WINDOWS * own_rows))
            raise SourceError(
                f"{file.path}: {unit} has {unit_rows:,} rows and can only be read as a whole, "
                f"while a window has {own_rows:,} of this source (--shuffle-window): it would be "
                f"read about {num_reads} times an epoch, and {MAX_GROUP_WINDOWS} windows are the "
                f"limit. Rewrite the file once, `miles prepare {source.name} --source {file.path} "
                "--tokenizer DIR --output FOLDER`, and train on FOLDER; or give a --shuffle-window "
                f"of {enough_rows:,} rows or more, which are held in memory together"
            )


def _units(file: File) -> Iterator[tuple[str, int]]:
    """Yield the parts of a file that are read as a whole: the name of each, and its rows."""
    if file.compression is not None:
        yield f"the {file.compression} file", file.num_rows
        return
    yield "the file", 0
    for number, group in enumerate(file.row_groups):
        yield f"row group {number}", group.num_rows
