"""`train.log` in the run folder: the driver's reports, with times, over all attempts of a run.

2026-11-25 08:00:12Z  … 8 trainers, going on at step 500 from s3://bucket/run/iter_0000500 (…)
2026-11-25 08:05:31Z  checkpoint  s3://bucket/run/iter_0000600
2026-11-25 08:06:02Z  ended: LostError: trainer 1 died during 'train_step': …
"""

from __future__ import annotations

import datetime
from types import TracebackType
from typing import Self

from rich.console import Console

from miles.common import run_folder, storage
from miles.common.patient_file import PatientFile
from miles.common.prose import Prose
from miles.common.redact import redact
from miles.common.screen import printable
from miles.train.driver.preemption import BETWEEN_STEPS


def time_now() -> str:
    """Return the time in UTC, to the second: "2026-11-25 08:00:12Z"."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S}Z"


class RunLog:
    """Reports lines on the terminal and keeps them in a file.

    As a context manager, it also notes the error that ended the run.

    Args:
        run_dir: the run folder (fsspec URL). If it is remote, the lines are kept in memory, and
            `flush` writes the file.
    """

    def __init__(self, run_dir: str, console: Console) -> None:
        self._console = console
        self._file = PatientFile.read(storage.join(run_dir, run_folder.RUN_LOG), self.show)

    def report(self, text: str) -> None:
        """Print a line on the terminal, above a progress line if there is one, and write it."""
        self.show(text)
        self.write(text)

    def show(self, text: str) -> None:
        """Print a line on the terminal alone."""
        self._console.print(Prose(f"  {text}"), soft_wrap=True)

    def write(self, text: str) -> None:
        """Add a line to the file, without printing it."""
        # No text of another hand can look like a line of ours.
        line = printable(redact(text)).replace("\n", "\n    ")
        self._file.add(f"{time_now()}  {line}")

    def flush(self) -> None:
        """Write the file if it is remote; a local one has each line at once."""
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            text = f"{type(error).__name__}: {error}"
            if isinstance(error, KeyboardInterrupt):
                text = str(error) or BETWEEN_STEPS
            self.write(f"ended: {text}")
        self._file.close()
