"""Memory that was freed goes back to the system."""

import psutil
import pytest

from miles.common import free_memory


def test_freed_memory_is_given_back() -> None:
    if free_memory._trim() is None:
        pytest.skip("this C library is not glibc")
    pieces = [bytes(2_000) for _ in range(50_000)]  # too small to be mapped by themselves
    kept = pieces[::100]
    del pieces
    before = psutil.Process().memory_info().rss
    free_memory.give_back()
    assert psutil.Process().memory_info().rss < before - (50 << 20)
    assert len(kept) == 500
