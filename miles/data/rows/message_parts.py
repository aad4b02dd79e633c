"""Rows with the columns of `MESSAGES` -> Parquet files of limited size, made in memory.

    rows     1000 1000 … 1000 | 1000 …            row groups, as they are added
    files    of 20,000 rows   | the next one      or of fewer, where these have 64 MB

Where a file ends depends on its rows alone, so that the same rows give the same bytes, whichever
process makes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from miles.data.step_schemas import MESSAGES


@dataclass(frozen=True)
class PartLimits:
    """The size of files."""

    group_rows: int = 1_000
    """rows of a row group, at most"""
    part_rows: int = 20_000
    """rows after which a file is full"""
    part_bytes: int = 64 << 20
    """bytes after which a file is full, however few rows it has"""


LIMITS = PartLimits()


class PartMaker:
    """Makes Parquet files, one after the other."""

    def __init__(self, limits: PartLimits) -> None:
        self._limits = limits
        self._file: _File | None = None

    def add(self, rows: pa.Table) -> None:
        """Append rows to the file."""
        if not rows.num_rows:
            return
        if self._file is None:
            self._file = _File(self._limits)
        self._file.add(rows)

    @property
    def is_full(self) -> bool:
        """Return whether the file has as many rows or bytes as it may have."""
        return self._file is not None and self._file.is_full

    def finish(self) -> bytes | None:
        """End the file and return its content; None: it has no row."""
        file, self._file = self._file, None
        return None if file is None else file.close()


class _File:
    """A Parquet file in memory."""

    def __init__(self, limits: PartLimits) -> None:
        self._limits = limits
        self._sink = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(self._sink, MESSAGES)
        self._num_rows = 0

    def add(self, rows: pa.Table) -> None:
        self._writer.write_table(rows, row_group_size=self._limits.group_rows)
        self._num_rows += rows.num_rows

    @property
    def is_full(self) -> bool:
        has_rows = self._num_rows >= self._limits.part_rows
        return has_rows or self._sink.tell() >= self._limits.part_bytes

    def close(self) -> bytes:
        self._writer.close()
        content: bytes = self._sink.getvalue().to_pybytes()
        return content
