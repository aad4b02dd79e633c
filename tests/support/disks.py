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
    """A disk that takes bytes, and has them safe (`fsync`) only while it goes.

    Args:
        folder: where its switch lies; it stands at first.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._switch = folder / "goes"
        (folder / "sitecustomize.py").write_text(
            "import os, time\n"
            "fsync = os.fsync\n"
            "def waiting(file):\n"
            f"    while not os.path.exists({str(self._switch)!r}):\n"
            "        time.sleep(0.02)\n"
            "    return fsync(file)\n"
            "os.fsync = waiting\n"
        )
        self.environment = {"PYTHONPATH": os.pathsep.join([str(folder), str(PROJECT)])}
        """For the processes that are to have this disk."""

    def go(self) -> None:
        self._switch.touch()

    def stand(self) -> None:
        self._switch.unlink()
