"""The Parquet files of a prepared folder, in the order of the rows: part-00000.parquet, …

A local file appears whole, under its name, and so does a store's. Some are written at a time, beside
the work on the next ones.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from miles.common import run_folder, storage
from miles.data.notebook.output_folder import PART, UNFINISHED

_THREADS = 4


class PartFiles:
    """The parts of one folder, in order. All are there when the context ends without an error.

    Args:
        url: the folder (fsspec URL). Parts and manifest of an earlier write are removed.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._num_files = 0
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="miles-parts")
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> PartFiles:
        with storage.writing(self._url):
            self._clear()
        return self

    def _clear(self) -> None:
        fs, folder = storage.filesystem(self._url)
        if storage.is_local(self._url):  # a store has no folders, and s3fs would make a bucket
            fs.makedirs(folder, exist_ok=True)
        # An earlier write's manifest would call the folder complete, and its parts would be read
        # back as rows of this one.
        names = storage.names(self._url)
        manifest = [name for name in names if name == run_folder.MANIFEST]
        parts = [name for name in names if PART.fullmatch(name) or UNFINISHED.fullmatch(name)]
        for name in (*manifest, *parts):
            fs.rm_file(f"{folder}/{name}")

    def __exit__(self, kind: object, *_: object) -> None:
        # After an error, one of a file says nothing more.
        try:
            while self._pending and kind is None:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def add(self, content: bytes) -> None:
        """Write the next file.

        Raises:
            WriteError: it cannot be written, or one before it.
        """
        url = storage.join(self._url, f"part-{self._num_files:05d}.parquet")
        self._num_files += 1
        self._pending.append(self._pool.submit(storage.write_bytes, url, content))
        if len(self._pending) > _THREADS:
            self._pending.popleft().result()
