"""Folders that appear when they are complete.

    DIR/.name.converting   while it is written   ->   DIR/name

A conversion that is killed leaves its hidden folder behind. The next one to the same place removes
it.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from miles.common.file_errors import writing
from miles.errors import CheckpointError, MilesError, WriteError


class StagedFolder:
    """An empty folder that is to take the place of `target`. End it by `commit` or `discard`.

    Args:
        target: the folder that it will be.

    Raises:
        CheckpointError: another process is writing the same target.
        WriteError: no folder can be made beside it, or none can take its place.
    """

    def __init__(self, target: Path) -> None:
        require_movable(target)
        with writing(str(target)):
            self._target = target.resolve()  # a link may lead to another disk
            self.path = self._target.with_name(f".{self._target.name}.converting")
            """the folder to fill"""
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _lock(self._lock, self._target)
            with writing(str(self.path), "removed"):
                _empty(self.path)
        except BaseException:
            os.close(self._lock)
            raise

    def commit(self) -> None:
        """Put the folder in the place of its target.

        Raises:
            WriteError: it cannot be moved there; it is removed.
        """
        old = self._target.with_name(f".{self._target.name}.replaced")
        try:
            with writing(str(self._target)):
                _replace(self._target, self.path, old)
        except BaseException:
            self.discard()
            raise
        os.close(self._lock)

    def discard(self) -> None:
        """Remove the folder; the target stays as it was."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_unfinished(targets: str) -> list[str]:
    """Remove the hidden folders that a killed process left beside some targets.

    A folder that another process is filling stays.

    Args:
        targets: path of the targets; `*` stands for any characters.

    Returns:
        the folders that were removed.
    """
    parent, name = os.path.split(targets)
    removed = []
    for path in glob.glob(os.path.join(parent, f".{name}.converting")):
        target = Path(path).with_name(Path(path).name[1:].removesuffix(".converting"))
        with contextlib.suppress(CheckpointError, OSError):
            StagedFolder(target).discard()
            removed.append(path)
    return removed


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """Have an empty folder take the place of `target` when the context ends.

    After an error in the context, the folder is removed and `target` stays as it was.

    Yields:
        the folder to fill.

    Raises:
        CheckpointError: another process is writing the same target.
        WriteError: it cannot be written.
    """
    staged = StagedFolder(target)
    try:
        yield staged.path
    except OSError as error:
        staged.discard()
        if isinstance(error, MilesError):
            raise
        with writing(str(error.filename or target)):
            raise
    except BaseException:
        staged.discard()
        raise
    staged.commit()


def require_movable(target: Path) -> None:
    """Refuse a folder whose place no other can take: a mount point.

    Raises:
        WriteError: names it, and what to do.
    """
    with writing(str(target)):
        path = target.resolve()
        is_mounted = path.is_mount() or str(path) in _mount_points()
    if is_mounted:
        raise WriteError(
            f"{target}: a disk is mounted there, and a folder that is complete cannot take the "
            "place of a mount point. Name a folder inside of it"
        )


def require_room(folder: Path, num_bytes: int) -> None:
    """Refuse to write more than a disk can hold, before the first byte.

    Args:
        folder: on the disk.
        num_bytes: that will be written.

    Raises:
        WriteError: says how much is free.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < num_bytes:
        raise WriteError(
            f"{folder}: {num_bytes / 1e9:.3g} GB are to be written, {free_bytes / 1e9:.3g} GB are "
            "free. Make room there, or name another disk"
        )


def _mount_points() -> set[str]:
    """Return the mount points of Linux: of bind mounts, too, which `is_mount` does not know."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {line.split(" ")[4].replace("\\040", " ") for line in lines}


def _lock(descriptor: int, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(f"{target}: another conversion is writing it") from error
    except OSError:
        pass  # a filesystem without locks


def _replace(target: Path, staged: Path, old: Path) -> None:
    """Move `staged` to `target`, which is at `old` meanwhile and is then removed."""
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    staged.rename(target)
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


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
