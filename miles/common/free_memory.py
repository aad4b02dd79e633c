"""Gives memory that was freed back to the system, where the C library would keep it.

Reading a tokenizer's definition needs 70 MiB for a moment, in small pieces between pieces that stay.
glibc keeps them for later, in each loader.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def give_back() -> None:
    """Give freed memory back: five milliseconds. Other C libraries than glibc are left alone."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
