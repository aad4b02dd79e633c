"""The processes that write a rank's part of a checkpoint: none outlives its parent, none dies unseen.

    rank ── results        for all checkpoints: holds what the writers return
         ── writer         for each checkpoint
              └─ file      for each file of it

Megatron forks them. It waits without end for the process of a file that was killed (by the kernel,
where memory is short). So the writer ends where such a process fails, and the rank looks at how the
writer ended before it believes that the files are there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from miles.errors import LostError


@functools.cache
def share_results() -> None:
    """Set up, once a process, how a forked writer returns its results and ends with this process.

    megatron-core 0.16.1 starts a manager by `spawn` for the results, and that manager outlives a
    rank that is killed. A forked one does not: the kernel kills each process forked from here when
    its parent dies.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if sys.platform == "linux":
        os.register_at_fork(after_in_child=_die_with_parent)
    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def ending_with_its_files(write: Callable[..., None]) -> Callable[..., None]:
    """Return a writer's function that ends its process when the process of a file fails."""
    return functools.partial(_write, write)


def _write(write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    signal.signal(signal.SIGCHLD, _end_where_a_file_failed)
    write(*args, **kwargs)


def _end_where_a_file_failed(number: int, frame: FrameType | None) -> None:
    # `active_children()` leaves out those that have ended, which are the ones to look at.
    for child in tuple(multiprocessing.process._children):  # type: ignore[attr-defined]
        if child.exitcode:
            os._exit(1)


def require_well(writer: multiprocessing.process.BaseProcess | None, rank: int) -> None:
    """Refuse the files of a writer that failed; one that is still writing is well.

    Args:
        writer: None where the rank has nothing to write.

    Raises:
        LostError: it was killed, or a process that it needs.
    """
    if writer is not None and writer.exitcode:
        raise LostError(_was_killed(rank))


@contextlib.contextmanager
def lost_with_their_results(rank: int) -> Iterator[None]:
    """Raise a `LostError` in place of the errors of a connection to the process of the results."""
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise LostError(_was_killed(rank)) from error


def _was_killed(rank: int) -> str:
    return f"a process that writes the part of trainer {rank} of a checkpoint was killed"
