"""Disks that are small, and disks that are slow."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import PROJECT


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """Mount a filesystem of its own at a folder; skip the test where that is not allowed.

    Args:
        options: of tmpfs, such as "size=256m".
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class StandingDisk:
    """A disk that takes the bytes of a checkpoint, but has them safe (`fsync`) only when it may.

    Args:
        folder: where notes lie of the checkpoints that it may have safe; none at first.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        (folder / "sitecustomize.py").write_text(_WAITING_FSYNC.format(notes=str(folder)))
        self.environment = {"PYTHONPATH": os.pathsep.join([str(folder), str(PROJECT)])}
        """For the processes that are to have this disk."""

    def let_go(self, iteration: int) -> None:
        """Have the checkpoint of an iteration safe."""
        (self._folder / f"iter_{iteration:07d}").touch()


_WAITING_FSYNC = """\
import os, re, time
fsync = os.fsync
def waiting(file):
    number = file if isinstance(file, int) else file.fileno()
    saving = re.search(r"/[.]saving-(iter_\\d+)", os.readlink(f"/proc/self/fd/{{number}}"))
    parent = os.getppid()
    while saving and not os.path.exists(os.path.join({notes!r}, saving[1])):
        if os.getppid() != parent:  # the run was killed
            os._exit(1)
        time.sleep(0.02)
    return fsync(file)
os.fsync = waiting
"""
