"""The processes that write a rank's part of a checkpoint: none outlives its parent, none dies unseen.

    rank ── results        for all checkpoints: holds what the writers return
         ── writer         for each checkpoint
              └─ file      for each file of it

Megatron forks them. It waits without end for the process of a file that was killed (by the kernel,
where memory is short). So the writer ends where such a process fails, and the rank looks at how the
writer ended before it believes that the files are there.

A forked process shares the memory of its parent, until either of them writes to it: then the kernel
copies it. Adam's step writes to all of its state, so what lies in the machine's memory of it would
be there twice while a writer lives. Writers do not get it (`left_out_of_forks`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch

from miles.errors import LostError

_DONTFORK, _DOFORK = 10, 11
"""Advice of madvise(2), on Linux."""


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


@contextlib.contextmanager
def left_out_of_forks(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Give processes that are forked in the context no memory of some tensors.

    It leaves out the pages that belong to a tensor alone. On other systems than Linux it does
    nothing.

    Args:
        tensors: on the CPU. The forked processes must not read them.
    """
    pages = [_own_pages(tensor) for tensor in tensors]
    _advise(pages, _DONTFORK)
    try:
        yield
    finally:
        _advise(pages, _DOFORK)


def _own_pages(tensor: torch.Tensor) -> range:
    """Return the addresses of the pages that hold nothing but a tensor's elements."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    return range(start, end)


def _advise(pages: Iterable[range], advice: int) -> None:
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    for addresses in pages:
        if addresses:
            # Where it fails, the memory is shared, as it would be without.
            madvise(ctypes.c_void_p(addresses.start), ctypes.c_size_t(len(addresses)), advice)


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
