"""Can a folder be written into? It is tried before the work begins, and leaves nothing behind.

    /disk/runs/new/one   ->   a file without a name in /disk/runs, the part that is there
    s3://bucket/run      ->   an empty object, put and removed

No folder and no bucket is created. S3's filesystem would create a bucket where its name is
mistyped.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from miles.common import retry, storage
from miles.errors import MilesError, WriteError

_PROBE = ".miles-probe"
"""Name of the object that is put into a remote folder; one name, so that no more than one stays
where it may not be removed."""


def require_writable(url: str, name: str) -> None:
    """Refuse a folder that cannot be written into. It may not be there yet.

    Args:
        url: of the folder (fsspec URL).
        name: of the setting, such as `--save`, for the error.

    Raises:
        WriteError: says why, and what to do.
        SourceError: a URL that cannot be opened.
    """
    try:
        if storage.is_local(url):
            _try_local(url)
        else:
            _try_remote(url)
    except WriteError as error:
        raise WriteError(f"{name} {error}") from error


def existing_part(path: Path) -> Path:
    """Return a path, or the nearest folder above it that is there."""
    path = path.absolute()
    while not os.path.lexists(path):
        path = path.parent
    return path


def _try_local(url: str) -> None:
    existing = existing_part(Path(storage.filesystem(url)[1]))
    if not existing.is_dir():
        raise WriteError(
            f"{url}: cannot be written: {existing} is not a folder. Name another place"
        )
    # On Linux this file never gets a name.
    with storage.writing(url), tempfile.TemporaryFile(dir=existing, prefix=_PROBE):
        pass


def _try_remote(url: str) -> None:
    fs, path = storage.filesystem(url)
    probe = f"{path.rstrip('/')}/{_PROBE}"
    try:
        with storage.writing(url):
            retry.call(lambda: fs.pipe_file(probe, b""), url, "written")
    except WriteError:
        raise
    except MilesError as error:
        raise WriteError(str(error)) from error
    # A store may take objects, and keep them.
    with contextlib.suppress(Exception):
        fs.rm_file(probe)
