"""A tensor's bytes, moved straight between a file and memory that is used again and again."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_READ_BYTES = 1 << 30
"""Bytes of one call. Linux moves less than 2 GiB."""
_WRITE_BYTES = 1 << 20
"""Likewise. On a machine short of memory, larger calls took up to half as long again."""
_RANGE_BYTES = 16 << 20
"""Bytes that are asked of a store at once."""
_kept = threading.local()


def buffer(use: str, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return memory for a tensor. It is valid until this thread asks for the same use again.

    Fresh memory from the system takes longer to fill than a file to read. So it is kept.

    Args:
        use: a name. Tensors that are needed at the same time have different ones.
    """
    held: dict[str, bytearray] = _kept.__dict__
    count = math.prod(sizes)
    if not count:
        return torch.empty(list(sizes), dtype=dtype)
    if len(held.get(use, b"")) < count * dtype.itemsize:
        held[use] = bytearray(count * dtype.itemsize)
    return torch.frombuffer(held[use], dtype=dtype, count=count).view(list(sizes))


def fill(tensor: Tensor, descriptor: int, begin: int) -> None:
    """Read a contiguous tensor's bytes from a file, which begin at a byte of it.

    Raises:
        EOFError: the file ends before them.
    """
    assert tensor.is_contiguous()
    content = _bytes_of(tensor)
    done = 0
    while done < len(content):
        got = os.preadv(descriptor, [content[done : done + _READ_BYTES]], begin + done)
        if not got:
            raise EOFError(f"it ends {len(content) - done:,} bytes too early")
        done += got


def fill_from(tensor: Tensor, read_range: Callable[[int, int], bytes], begin: int) -> None:
    """Read a contiguous tensor's bytes by ranges of a remote file, from one of its bytes on.

    Args:
        read_range: returns bytes [begin, end) of the file.
    """
    assert tensor.is_contiguous()
    content = _bytes_of(tensor)
    for at in range(0, len(content), _RANGE_BYTES):
        end = min(at + _RANGE_BYTES, len(content))
        content[at:end] = read_range(begin + at, begin + end)


def write(tensor: Tensor, descriptor: int, begin: int) -> None:
    """Write a tensor's bytes into a file, from one of its bytes on."""
    content = _bytes_of(tensor.contiguous())
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done : done + _WRITE_BYTES], begin + done)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
