"""Converting in threads, with a bar of the bytes that are done and of the time that is left."""

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

from miles.common.screen import is_live
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
    """Run jobs in threads; return their results in the order of the jobs.

    After the first error no other job is begun, and the error is raised.

    Args:
        do: runs one job, in a thread. It is given a function to report bytes to, which breaks it
            off after another job's error.
        report: is given the bytes of all jobs.
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
    """Divide items into groups, in their order.

    Args:
        num_bytes: of an item.
        max_bytes: a group is closed before an item that would make it larger.
    """
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
    """Show a bar while the context lasts.

    Args:
        console: None: nothing is shown.

    Yields:
        a function to report finished bytes to, from any thread.
    """
    progress = Progress(
        TextColumn("  {task.description}", markup=False),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=console is None or not is_live(console),
    )
    task = progress.add_task(label, total=num_bytes)
    with progress:
        yield lambda done: progress.advance(task, done)
