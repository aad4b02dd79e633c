"""Converting in threads, with a bar that says how many bytes are done and how long the rest will take."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

NUM_THREADS = min(4, os.cpu_count() or 1)
"""Each holds a tensor or two at a time; more would wait for the disk."""

T = TypeVar("T")
R = TypeVar("R")


def each(jobs: Sequence[T], do: Callable[[T], R]) -> list[R]:
    """The result of each job, in their order. After the first error no other is begun, and it is raised."""
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="miles-convert") as pool:
        futures = [pool.submit(do, job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            failed = next((future for future in futures if future.done() and future.exception()), None)
            if failed is not None:
                failed.result()
        except BaseException:  # Ctrl-C, too
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


@contextlib.contextmanager
def bar(console: Console | None, label: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar while the context lasts; what it gives is told the bytes that were done, from any thread.

    Args:
        console: None: nothing is shown.
    """
    progress = Progress(
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=console is None,
    )
    task = progress.add_task(label, total=num_bytes)
    with progress:
        yield lambda done: progress.advance(task, done)
