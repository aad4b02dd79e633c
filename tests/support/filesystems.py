"""Filesystems over fsspec's memory one, whose files they share: one that fails, one that counts,
one that is slow.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem


class PayloadError(Exception):
    """As aiohttp's `ClientPayloadError`, which is no OSError."""


class StatusError(Exception):
    """As the error of an HTTP library."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


ERRORS: dict[str, Callable[[], Exception]] = {
    "connection": lambda: ConnectionResetError(errno.ECONNRESET, "reset by peer"),
    "timeout": lambda: TimeoutError("timed out"),
    "io": lambda: OSError(errno.EIO, "input/output error"),
    "no number": lambda: OSError("something"),
    "payload": lambda: PayloadError("not all came"),
    "busy": lambda: StatusError(503),
    "short": lambda: AssertionError("short reads are made by the handle"),
}


class _Shared(MemoryFileSystem):
    """The files of memory://, under another protocol."""

    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix(f"{cls.protocol}://"))

    def unstrip_protocol(self, name: str) -> str:
        return f"{self.protocol}://{name}"


class Faulty(_Shared):
    """Fails at every n-th call of each kind (info, ls, open, read, write) that a thread makes."""

    protocol = "faulty"
    every: ClassVar[int] = 3
    fault: ClassVar[str | Callable[[], Exception]] = "connection"
    calls: ClassVar[Counter[str]] = Counter()
    calls_of_thread: ClassVar[Counter[str]] = Counter()
    num_faults: ClassVar[int] = 0

    @classmethod
    def call(cls, kind: str) -> bool:
        """Raise at every n-th call, or return that the read is to come short."""
        cls.calls[kind] += 1
        key = f"{kind} {threading.get_ident()}"
        cls.calls_of_thread[key] += 1
        if cls.calls_of_thread[key] % cls.every:
            return False
        if cls.fault == "short" and kind == "read":
            cls.num_faults += 1
            return True
        if cls.fault == "short":
            return False
        cls.num_faults += 1
        raise ERRORS[cls.fault]() if isinstance(cls.fault, str) else cls.fault()

    def info(self, path: str, **kwargs: Any) -> Any:
        self.call("info")
        return super().info(path, **kwargs)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self.call("ls")
        return super().ls(path, detail=detail, **kwargs)

    cat_file = AbstractFileSystem.cat_file  # opens, seeks and reads

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode != "rb":
            return super()._open(path, mode, **kwargs)
        self.call("open")
        path = self._strip_protocol(path)
        if path not in self.store:
            raise FileNotFoundError(path)
        return _FaultyHandle(self, path, self.store[path].getvalue())

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self.call("write")
        super().pipe_file(path, value, mode)


class _FaultyHandle(MemoryFile):
    def read(self, size: int | None = -1, /) -> bytes:
        is_short = Faulty.call("read")
        content: bytes = super().read(size)
        return content[: len(content) // 2] if is_short else content


class Counting(_Shared):
    """Notes which bytes of which file are asked for."""

    protocol = "counting"
    ranges: ClassVar[list[tuple[str, int, int]]] = []

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        content: bytes = super().cat_file(path, start, end)
        self.ranges.append((self._strip_protocol(path), start or 0, (start or 0) + len(content)))
        return content

    @classmethod
    def num_bytes(cls) -> int:
        return sum(end - begin for _, begin, end in cls.ranges)


class Slow(_Shared):
    """Answers after a while, as object storage does."""

    protocol = "slow"
    delay_seconds: ClassVar[float] = 0.03
    lock = threading.Lock()
    num_calls: ClassVar[int] = 0

    def _wait(self) -> None:
        with self.lock:
            Slow.num_calls += 1
        time.sleep(self.delay_seconds)

    def info(self, path: str, **kwargs: Any) -> Any:
        self._wait()
        return super().info(path, **kwargs)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        self._wait()
        content: bytes = super().cat_file(path, start, end)
        return content


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """The store of all of them, empty; and each as it was."""
    for kind in (Faulty, Counting, Slow):
        fsspec.register_implementation(kind.protocol, kind, clobber=True)
    Faulty.every, Faulty.fault, Faulty.num_faults = 3, "connection", 0
    Faulty.calls.clear()
    Faulty.calls_of_thread.clear()
    Counting.ranges.clear()
    Slow.num_calls = 0
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
