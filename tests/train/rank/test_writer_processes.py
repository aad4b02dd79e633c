"""The death of a process that writes a part of a checkpoint is seen at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from miles.errors import LostError
from miles.train.rank import writer_processes
from tests.support.fault_table import SINCE, observed
from tests.support.processes import wait_until

FORK = multiprocessing.get_context("fork")


def write_file(seconds: float) -> None:
    time.sleep(seconds)


def write_files(seconds: float, pids: Connection) -> None:
    """Do as Megatron's writer does: start a process for each file, wait until all have counted."""
    count = FORK.JoinableQueue()
    count.put(0)
    well, slow = (FORK.Process(target=write_file, args=(wait,)) for wait in (0, seconds))
    well.start()
    slow.start()
    pids.send(slow.pid)
    slow.join() if not seconds else count.join()


def writer(seconds: float) -> tuple[multiprocessing.process.BaseProcess, int]:
    """Start a writer; return it, and the id of its process of a file."""
    receiving, sending = FORK.Pipe(duplex=False)
    write = writer_processes.ending_with_its_files(write_files)
    process = FORK.Process(target=write, args=(seconds, sending))
    process.start()
    return process, receiving.recv()


def test_a_writer_is_left_without_the_memory_of_tensors() -> None:
    tensor = torch.ones(1 << 20)

    def is_shared() -> bool:
        """Return whether a forked process has the page in the middle of the tensor."""
        address = tensor.data_ptr() + tensor.nbytes // 2
        receiving, sending = FORK.Pipe(duplex=False)
        process = FORK.Process(target=lambda: sending.send(has_memory(address)))
        process.start()
        answer: bool = receiving.recv()
        process.join()
        return answer

    assert is_shared()
    with writer_processes.left_out_of_forks([tensor, torch.ones(3)]):
        assert not is_shared()
    assert is_shared()
    assert tensor.sum() == len(tensor)


def has_memory(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(word, 16) for word in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


def test_killed_process_of_a_file_ends_its_writer() -> None:
    process, pid = writer(600)
    writer_processes.require_well(process, 1)
    assert process.is_alive(), "it writes"

    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not process.is_alive())
    with pytest.raises(LostError) as raised:
        writer_processes.require_well(process, 1)
    # tests/integration/test_chaos.py kills writers of a run: it starts again from its checkpoint.
    observed("writer of a checkpoint killed", str(raised.value), "trainer 1", SINCE)


def test_killed_writer_is_seen() -> None:
    process, pid = writer(600)
    process.kill()
    process.join()
    os.kill(pid, signal.SIGKILL)  # in a rank, it would end with its parent
    with pytest.raises(LostError):
        writer_processes.require_well(process, 0)


def test_files_that_are_written_are_well() -> None:
    process, _ = writer(0)
    process.join()
    writer_processes.require_well(process, 0)
    writer_processes.require_well(None, 0)


@pytest.mark.parametrize("error", [EOFError(), ConnectionRefusedError(), BrokenPipeError()])
def test_lost_results_are_a_loss(error: Exception) -> None:
    with pytest.raises(LostError), writer_processes.lost_with_their_results(0):
        raise error
