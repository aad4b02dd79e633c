"""A tensor's bytes, straight between a file and memory that is used again and again."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_READ_BYTES = 1 << 30  # Linux moves less than 2 GiB in one call
_WRITE_BYTES = 1 << 20  # where memory is slow to come, larger calls took up to half as long again
_kept = threading.local()


def buffer(use: str, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for a tensor, in a storage of just its size, until this thread asks for the same use again.

    Memory that the system has just given takes longer to fill than a file to read: it is kept.
    """
    held: dict[str, bytearray] = _kept.__dict__
    count = math.prod(sizes)
    if not count:
        return torch.empty(list(sizes), dtype=dtype)
    if len(held.get(use, b"")) < count * dtype.itemsize:
        held[use] = bytearray(count * dtype.itemsize)
    return torch.frombuffer(held[use], dtype=dtype, count=count).view(list(sizes))


def fill(tensor: Tensor, descriptor: int, begin: int) -> None:
    """Reads a contiguous tensor's bytes, from a byte of a file on.

    Raises:
        EOFError: the file ends before.
    """
    assert tensor.is_contiguous()
    content = _bytes_of(tensor)
    done = 0
    while done < len(content):
        got = os.preadv(descriptor, [content[done : done + _READ_BYTES]], begin + done)
        if not got:
            raise EOFError(f"it ends {len(content) - done:,} bytes too early")
        done += got


def write(tensor: Tensor, descriptor: int, begin: int) -> None:
    """Writes a tensor's bytes, from a byte of a file on."""
    content = _bytes_of(tensor.contiguous())
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done : done + _WRITE_BYTES], begin + done)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
