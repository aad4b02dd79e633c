"""Converting in threads, with a bar that says how many bytes are done and how long the rest will take."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from miles.common.storage import Report

NUM_THREADS = min(4, os.cpu_count() or 1)
"""Each holds a tensor or two at a time; more would wait for the disk."""

T = TypeVar("T")
R = TypeVar("R")


class _StoppedError(Exception):
    """Another job failed, or Ctrl-C was pressed."""


def each(
    jobs: Sequence[T], do: Callable[[T, Report], R], report: Report = lambda num_bytes: None
) -> list[R]:
    """The result of each job, in their order. After the first error no other is begun, and it is raised.

    Args:
        do: runs a job in a thread. Where it reports, it is broken off if the others were.
    """
    stopped = threading.Event()

    def report_or_stop(num_bytes: int) -> None:
        if stopped.is_set():
            raise _StoppedError
        report(num_bytes)

    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="miles-convert") as pool:
        futures = [pool.submit(do, job, report_or_stop) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:  # Ctrl-C, too
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def grouped(items: Sequence[T], num_bytes: Callable[[T], int], max_bytes: int) -> list[list[T]]:
    """Items in their order, in groups: a new one where the next item would make it larger than that."""
    groups: list[list[T]] = [[]]
    held_bytes = 0
    for item in items:
        if groups[-1] and held_bytes + num_bytes(item) > max_bytes:
            groups.append([])
            held_bytes = 0
        groups[-1].append(item)
        held_bytes += num_bytes(item)
    return groups


@contextlib.contextmanager
def bar(console: Console | None, label: str, num_bytes: int) -> Iterator[Report]:
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
