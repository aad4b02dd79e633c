"""`train.log` in the run's folder: what the terminal was told, with the time, over all starts of a run.

2026-11-25 08:00:12Z  started, going on at step 500
2026-11-25 08:05:31Z  checkpoint  s3://bucket/run/iter_0000600
2026-11-25 08:06:02Z  ended: ClusterError: trainer 1 died during 'train_step': …
"""

from __future__ import annotations

import datetime
from types import TracebackType
from typing import Self

from rich.console import Console

from miles.common import run_folder, storage
from miles.common.redact import redact


def time_now() -> str:
    """UTC, to the second: "2026-11-25 08:00:12Z"."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S}Z"


class Journal:
    """Says a line on the terminal, and writes it down. In a `with`, it notes the error that ended the run.

    Args:
        url: the run's folder (fsspec URL). Remote: the file is kept in memory and written whole by `flush`.
    """

    def __init__(self, url: str, console: Console) -> None:
        self._path, self._console = storage.join(url, run_folder.RUN_LOG), console
        self._text = storage.read_text(self._path) if storage.exists(self._path) else ""
        self._local = storage.is_local(url)

    def say(self, text: str) -> None:
        """Both on the terminal (above a progress line, where there is one) and in the file."""
        self._console.print(f"  {text}", soft_wrap=True, highlight=False, markup=False, emoji=False)
        self.write(text)

    def write(self, text: str) -> None:
        """In the file only."""
        self._text += f"{time_now()}  {redact(text)}\n"
        if self._local:
            self.flush()

    def flush(self) -> None:
        storage.write_text(self._path, self._text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.write(f"ended: {type(error).__name__}: {error}")
        self.flush()
