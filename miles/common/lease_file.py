"""The file of a lease, on a disk or in an object store: small, and changed by compare and swap.

    create      nothing is there      -> a new file     fails where another process was quicker
    renew       the file that I read  -> my next one    fails where it is another one by now
    take_over   the file that I read  -> mine           fails where it is another one by now

On a disk, a file is created by a hard link, renewed in place and taken over by a move under
`flock`. So whoever renews one that was taken over writes into a file that has no name any more. In
an object store, the requests are conditional (`If-None-Match`, `If-Match`). A store that ignores or
refuses the conditions gets plain ones; its caller reads again before it relies on the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from miles.common import storage

_CONFLICTS = ("PreconditionFailed", "ConditionalRequestConflict")
"""S3's names for: the condition of a request did not hold."""
_REFUSALS = ("NotImplemented", "ParamValidationError", "TypeError", "NotImplementedError")
"""The words of a store, or its library, for a condition that it does not know."""


@dataclass(frozen=True)
class LeaseCopy:
    """The file as it was read."""

    content: bytes
    version: str
    """differs when the file was written since, or is another one: inode and time, or entity tag"""


class LeaseFile(Protocol):
    """The file of a lease in some storage."""

    def read(self) -> LeaseCopy | None:
        """Return the file as it is now; None: there is none."""

    def create(self, content: bytes) -> bool:
        """Write the file if there is none; return whether there was none."""

    def renew(self, copy: LeaseCopy, content: bytes) -> bool:
        """Write the file anew if it is still the copy; return whether it was. Of equal length."""

    def take_over(self, copy: LeaseCopy, content: bytes) -> bool:
        """Replace a file of another process if it is still the copy; return whether it was."""

    def remove(self, copy: LeaseCopy) -> None:
        """Remove the file if it is still the copy."""


def lease_file(url: str) -> LeaseFile:
    """Return the file of a lease.

    Args:
        url: its fsspec URL.
    """
    fs, path = storage.filesystem(url)
    return _DiskFile(Path(path)) if storage.is_local(url) else _StoreFile(fs, path)


class _DiskFile:
    """A file on a disk of this machine, or on one that machines share."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> LeaseCopy | None:
        try:
            descriptor = os.open(self._path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        with open(descriptor, "rb") as stream:
            content = stream.read()
            return LeaseCopy(content, _version(descriptor))

    def create(self, content: bytes) -> bool:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._written(content) as temporary:
            try:
                os.link(temporary, self._path)
            except FileExistsError:
                return False
            except OSError:  # a filesystem without hard links
                return self._create_exclusively(content)
        return True

    def renew(self, copy: LeaseCopy, content: bytes) -> bool:
        try:
            descriptor = os.open(self._path, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            if LeaseCopy(os.pread(descriptor, 2 * len(content), 0), _version(descriptor)) != copy:
                return False
            os.pwrite(descriptor, content, 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return True

    def take_over(self, copy: LeaseCopy, content: bytes) -> bool:
        with self._locked(copy) as is_same, self._written(content) as temporary:
            if is_same:
                os.replace(temporary, self._path)
        return is_same

    def remove(self, copy: LeaseCopy) -> None:
        with self._locked(copy) as is_same:
            if is_same:
                self._path.unlink()

    def _create_exclusively(self, content: bytes) -> bool:
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with open(descriptor, "wb") as stream:
            stream.write(content)
        return True

    @contextlib.contextmanager
    def _written(self, content: bytes) -> Iterator[Path]:
        """Yield another file with a content, which has lost that name when the context ends."""
        temporary = self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_bytes(content)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, copy: LeaseCopy) -> Iterator[bool]:
        """Lock the file against others that take it over; yield whether it is still the copy."""
        try:
            descriptor = os.open(self._path, os.O_RDWR)
        except FileNotFoundError:
            yield False
            return
        try:
            # By its name, the file may be another one by now.
            yield _lock(descriptor) and self.read() == copy
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a file; return whether no other process has it locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a filesystem without locks
        return True
    return True


def _version(descriptor: int) -> str:
    status = os.fstat(descriptor)
    return f"{status.st_ino}:{status.st_mtime_ns}"


class _StoreFile:
    """An object in a store."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs = fs
        self._path = path

    def read(self) -> LeaseCopy | None:
        self._fs.invalidate_cache(self._path)
        try:
            answer = self._fs.info(self._path)
            return LeaseCopy(self._fs.cat_file(self._path), str(answer.get("ETag", "")))
        except FileNotFoundError:
            return None

    def create(self, content: bytes) -> bool:
        return self._put(content, {"mode": "create"})

    def renew(self, copy: LeaseCopy, content: bytes) -> bool:
        return self._put(content, {"IfMatch": copy.version} if copy.version else {})

    def take_over(self, copy: LeaseCopy, content: bytes) -> bool:
        try:
            return self.renew(copy, content)
        except FileNotFoundError:
            return False

    def remove(self, copy: LeaseCopy) -> None:
        current = self.read()
        if current is not None and current.content == copy.content:
            self._fs.rm_file(self._path)

    def _put(self, content: bytes, condition: dict[str, str]) -> bool:
        """Write the object under a condition; return whether it held."""
        try:
            self._fs.pipe_file(self._path, content, **condition)
        except FileExistsError:
            return False
        except Exception as error:
            kind = _kind_of(error)
            if kind in _CONFLICTS:
                return False
            if kind not in _REFUSALS or not condition:
                raise
            self._fs.pipe_file(self._path, content)
        return True


def _kind_of(error: BaseException) -> str:
    """Return S3's own name for an error; else that of its class."""
    response = getattr(error.__cause__ or error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return str(code or type(error).__name__)
