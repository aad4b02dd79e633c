"""Files that spare work at the next start, in a folder of the user's own.

    $MILES_CACHE/encoders-1000/3f9a….state     (by default ~/.cache/miles; empty: nothing is kept,
                                                nor in a store such as s3://…)

A cache may be lost, cut off, written by a newer version, or lie in a folder that several users
share. So a file is used only where it is a plain file of this user's that nobody else may write, in
a folder for which the same holds, and its content has the hash that stands before it. What fails
any of that is as good as not there: it is made anew. A folder that cannot be written is no error;
one that others may write, too, is passed over, and the process says so once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "MILES_CACHE"

_SUFFIX = ".state"
_MAGIC = b"miles cache 1\n"
_MAX_BYTES = 512 << 20
_HASH_BYTES = hashlib.sha256().digest_size
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_ABANDONED_SECONDS = 3600.0
"""A half-written file of that age is of a process that died."""


def root() -> str | None:
    """Return the folder of all caches, an fsspec URL; None where nothing is to be kept."""
    given = os.environ.get(VARIABLE)
    if given is not None:
        return given if given.strip() else None
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        return None
    if sys.platform == "darwin":
        return str(Path(home, "Library", "Caches", "miles"))
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return str(Path(shared if os.path.isabs(shared) else Path(home, ".cache"), "miles"))


def folder() -> Path | None:
    """Return the same, where it is on a disk: who may write a store is not known."""
    url = (root() or "").removeprefix("file://")
    return Path(url).absolute() if url and "://" not in url else None


def read(kind: str, key: str) -> bytes | None:
    """Return what was written under a key; None where it is not there, or not to be trusted.

    Args:
        kind: names the folder within the cache.
        key: letters and digits.
    """
    place = _place(kind)
    if place is None:
        return None
    name = key + _SUFFIX
    content = None
    with contextlib.suppress(OSError), _private_folder(place) as directory:
        content = _read_private(name, directory)
        os.utime(name, dir_fd=directory, follow_symlinks=False)  # those used last are kept
    if content is None or not content.startswith(_MAGIC):
        return None

    begin = len(_MAGIC) + _HASH_BYTES
    digest = hashlib.sha256(memoryview(content)[begin:]).digest()
    return content[begin:] if digest == content[len(_MAGIC) : begin] else None


def write(kind: str, key: str, content: bytes, max_files: int) -> None:
    """Keep something under a key, as far as the folder can be written.

    Args:
        kind, key: as for `read`.
        max_files: of this kind; the oldest make room.
    """
    place = _place(kind)
    if place is None:
        return
    with contextlib.suppress(OSError):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _private_folder(place) as directory:
            _replace(key + _SUFFIX, content, directory)
            _make_room(directory, max_files)


def private_folder(kind: str) -> Path | None:
    """Return the folder of a kind, made where it is not there, for files of other forms.

    None where nothing is kept on a disk, or it is not a private folder of this user's.
    """
    place = _place(kind)
    if place is None:
        return None
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _private_folder(place):
            return place if os.access(place, os.W_OK) else None
    except OSError:
        return None


def _place(kind: str) -> Path | None:
    """Return the folder of a kind: each user has one, also where a cache is shared."""
    root = folder()
    return None if root is None else root / f"{kind}-{os.geteuid()}"


@contextlib.contextmanager
def _private_folder(place: Path) -> Iterator[int]:
    """Open a folder of this user's, in which nobody else can put files; yield its descriptor.

    What is done in it goes by the descriptor: nobody can put another folder in its place meanwhile.

    Raises:
        OSError: it is not there, a link, another user's, or open to others.
    """
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not _is_own(os.fstat(directory)):
            _say_passed_over(place)
            raise PermissionError(f"{place}: not a private folder of this user")
        yield directory
    finally:
        os.close(directory)


@functools.cache
def _say_passed_over(place: Path) -> None:
    """Tell the user, once, about a folder in which others may put files."""
    print(
        f"miles: nothing is kept in {place}: it is another user's, or others may write it. "
        f"`chmod go-w` mends the second; or set {VARIABLE} to another folder",
        file=sys.stderr,
    )


def _is_own(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_MAY_WRITE


def _read_private(name: str, directory: int) -> bytes | None:
    """Return the content of a plain file of this user's; a link is not followed."""
    # Without O_NONBLOCK, a pipe in its place would be waited for.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, dir_fd=directory), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or not _is_own(found) or found.st_size > _MAX_BYTES:
            return None
        return file.read()


def _replace(name: str, content: bytes, directory: int) -> None:
    """Write a file under another name, and put it in its place when it is complete."""
    staged = f".{name}.{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    number = os.open(staged, flags, 0o600, dir_fd=directory)
    try:
        with os.fdopen(number, "wb") as file:
            file.writelines((_MAGIC, hashlib.sha256(content).digest(), content))
        try:
            os.replace(staged, name, src_dir_fd=directory, dst_dir_fd=directory)
        except IsADirectoryError:
            shutil.rmtree(name, dir_fd=directory)
            os.replace(staged, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(staged, dir_fd=directory)
        raise


def _make_room(directory: int, max_files: int) -> None:
    """Remove the files that were used longest ago, and what dead processes left."""
    files = []
    with os.scandir(directory) as entries:
        for entry in entries:
            is_ours = entry.name.endswith(_SUFFIX) or f"{_SUFFIX}." in entry.name
            if not is_ours or entry.is_dir(follow_symlinks=False):
                continue
            age = time.time() - entry.stat(follow_symlinks=False).st_mtime
            if not entry.name.startswith("."):
                files.append((age, entry.name))
            elif age > _ABANDONED_SECONDS:
                os.unlink(entry.name, dir_fd=directory)
    for _, name in sorted(files)[max_files:]:
        os.unlink(name, dir_fd=directory)
