"""Folders that appear when they are complete.

    DIR/.name.converting   while it is written   ->   DIR/name

What a conversion that was killed left behind is removed by the next one to the same place.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from miles.errors import CheckpointError


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """An empty folder, which takes the place of `target` where the context ends well, and is removed where it does not.

    Raises:
        CheckpointError: another process is writing the same target.
    """
    target = target.resolve()  # a link leads to another disk, perhaps
    staged = target.with_name(f".{target.name}.converting")
    old = target.with_name(f".{target.name}.replaced")
    staged.mkdir(parents=True, exist_ok=True)
    lock = os.open(staged, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{target}: another conversion is writing it") from error
        except OSError:
            pass  # a filesystem that knows no locks
        try:
            _empty(staged)
            yield staged
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.rename(old)
            staged.rename(target)
            _sync_folder(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def require_room(folder: Path, num_bytes: int) -> None:
    """Refuses what a disk cannot hold, before the first byte.

    Raises:
        CheckpointError: says how much is free.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < num_bytes:
        raise CheckpointError(
            f"{folder}: {num_bytes / 1e9:.3g} GB are to be written, {free_bytes / 1e9:.3g} GB are free"
        )


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
