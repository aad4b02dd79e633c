"""The Parquet files of a prepared folder, in the order of the rows: part-00000.parquet, …"""

from __future__ import annotations

import contextlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from miles.common import run_folder, storage
from miles.data.notebook.output_folder import PART
from miles.data.rows.messages_parquet import WRITTEN

GROUP_ROWS = 1_000
"""Rows of a row group."""
FILE_ROWS = 100_000
"""Rows after which the next file is begun."""


class PartFiles:
    """The parts of one folder, in order. The last is complete when the context ends.

    Args:
        url: the folder (fsspec URL). Parts and manifest of an earlier write are removed.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._fs, self._folder = storage.filesystem(url)
        self._num_files = 0
        self._rows_in_file = 0
        self._stream: Any = None
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> PartFiles:
        with storage.writing(self._url):
            self._clear()
        return self

    def _clear(self) -> None:
        if storage.is_local(self._url):  # a store has no folders, and s3fs would make a bucket
            self._fs.makedirs(self._folder, exist_ok=True)
        # An earlier write's parts would be read back as rows of this one, and its manifest would
        # call the folder complete.
        names = [name for name in storage.names(self._url) if PART.fullmatch(name)]
        earlier = [f"{self._folder}/{name}" for name in names]
        for path in (*earlier, f"{self._folder}/{run_folder.MANIFEST}"):
            if self._fs.exists(path):
                self._fs.rm_file(path)

    def __exit__(self, kind: object, *_: object) -> None:
        # After an error, one of closing the file says nothing more.
        with contextlib.suppress(Exception) if kind else storage.writing(self._part):
            self._finish_file()

    @property
    def _part(self) -> str:
        """Return the URL of the file that is written."""
        return storage.join(self._url, f"part-{self._num_files:05d}.parquet")

    def add(self, table: pa.Table) -> None:
        """Append rows with the columns of `WRITTEN`.

        Raises:
            WriteError: they cannot be written.
        """
        with storage.writing(self._part):
            self._add(table)

    def _add(self, table: pa.Table) -> None:
        if self._writer is None:
            storage.require_held(self._url)
            self._stream = self._fs.open(storage.filesystem(self._part)[1], "wb")
            self._writer = pq.ParquetWriter(self._stream, WRITTEN)
        self._writer.write_table(table, row_group_size=GROUP_ROWS)
        self._rows_in_file += table.num_rows
        if self._rows_in_file >= FILE_ROWS:
            self._finish_file()

    def _finish_file(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._stream.close()
        self._writer = None
        self._num_files += 1
        self._rows_in_file = 0
