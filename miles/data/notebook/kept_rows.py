"""Rows that are no file become one, named by its content.

    3 rows as JSON lines  ->  $MILES_CACHE/rows-1000/9c1e….jsonl     the same rows: the same file

Whatever reads files then reads them: the manifest, loaders, `miles inspect`, a run. The name is the
SHA-256 of the content, and a local file has a fixed time of change, so that a manifest of the same
rows has the same fingerprint on another day and on another machine. A file that no `prepare` named
for `_UNUSED_SECONDS` is removed; the same call writes it again, as it was.

Where `MILES_CACHE` is a store such as s3://…, the file is copied there, so that loaders on other
machines find it. Where nothing may be kept, the file lies in a folder that is removed when the
process ends.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from miles.common import cache_files, storage
from miles.common.file_errors import writing

_KIND = "rows"
_TIME_OF_CHANGE = 1_000_000_000
"""Seconds since 1970. Any constant serves."""
_UNUSED_SECONDS = 30 * 24 * 3600
_ABANDONED_SECONDS = 24 * 3600
"""A half-written file of that age is of a process that died."""
_STAGED = ".tmp"
_HASH_DIGITS = 32


def keep(suffix: str, write: Callable[[BinaryIO], None]) -> str:
    """Write a file, and give it the name that its content has.

    Args:
        suffix: of its name, such as `.jsonl`.
        write: writes the content.

    Returns:
        Its URL: local, or in the store that `MILES_CACHE` names.

    Raises:
        WriteError: the disk or the store does not take it.
    """
    folder = _folder()
    with writing(str(folder)):
        descriptor, staged = tempfile.mkstemp(_STAGED, f".{suffix.strip('.')}-", folder)

    try:
        # An error of `write` is an error of the rows, not of the disk.
        with os.fdopen(descriptor, "w+b") as file:
            write(file)
            with writing(str(folder)):
                file.flush()
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()[:_HASH_DIGITS]

        target = folder / (digest + suffix)
        with writing(str(target)):
            os.utime(staged, (time.time(), _TIME_OF_CHANGE))
            os.replace(staged, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(staged)
        raise

    _remove_unused(folder)
    return _in_store(target) or str(target)


def _folder() -> Path:
    """Return the folder on this machine: the cache's, or one for this process."""
    folder = cache_files.private_folder(_KIND)
    return folder if folder is not None else _temporary_folder()


@functools.cache
def _temporary_folder() -> Path:
    with writing("a temporary folder"):
        folder = tempfile.mkdtemp(prefix="miles-rows-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _in_store(file: Path) -> str | None:
    """Return the URL of a copy in the store of the cache; None where the cache is on a disk."""
    root = cache_files.root()
    if root is None or cache_files.folder() is not None:
        return None
    url = storage.join(root, _KIND, file.name)
    num_bytes = file.stat().st_size

    # The name is the content's: what is there already stays, and keeps its stamp.
    if not (storage.exists(url) and storage.size_of(url, storage.info(url)) == num_bytes):
        fs, path = storage.filesystem(url)
        with writing(url):
            fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            fs.put_file(str(file), path)
    return url


def _remove_unused(folder: Path) -> None:
    """Remove files that nobody asked for in a long time, and what dead processes left."""
    now = time.time()
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = entry.stat(follow_symlinks=False)
            is_staged = entry.name.endswith(_STAGED)
            age = now - (found.st_mtime if is_staged else found.st_atime)
            if age > (_ABANDONED_SECONDS if is_staged else _UNUSED_SECONDS):
                os.unlink(entry.path)
