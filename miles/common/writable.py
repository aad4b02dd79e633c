"""Whether a run can write where it is to write: tried before it starts, leaving nothing behind.

    /disk/runs/new/one   ->   a file without a name in /disk/runs, the part that is there
    s3://bucket/run      ->   an empty object, put and removed

No folder and no bucket is created. S3's filesystem would create a bucket where its name is
mistyped.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path

from miles.common import retry, storage
from miles.common.file_errors import cause_of, in_own_words
from miles.common.redact import redact
from miles.errors import MilesError, WriteError

_PROBE = ".miles-probe"
"""Name of the object that is put into a remote folder; one name, so that no more than one stays
where it may not be removed."""


def require_writable(url: str, flag: str) -> None:
    """Refuse a folder that cannot be written into. It may not be there yet.

    Args:
        url: of the folder (fsspec URL).
        flag: that names it, for the error.

    Raises:
        WriteError: says why, and what to do.
        SourceError: a URL that cannot be opened.
    """
    fs, path = storage.filesystem(url)
    if storage.is_local(url):
        _require_local(Path(path), f"{flag} {url}")
        return

    probe = f"{path.rstrip('/')}/{_PROBE}"
    try:
        retry.call(lambda: fs.pipe_file(probe, b""), url, "written")
    except FileNotFoundError as error:
        bucket = path.split("/", 1)[0]
        raise WriteError(
            f"{flag} {redact(url)}: there is no {bucket!r} to write into. A bucket is never "
            "created here: create it, or correct its name"
        ) from error
    except MilesError as error:
        raise WriteError(f"{flag} {error}") from error
    # Every filesystem has its own exceptions (botocore, google, adlfs).
    except Exception as error:
        reason = cause_of(error, url) or (
            f"{in_own_words(error)}. Give credentials that may write there, or another place"
        )
        raise WriteError(f"{flag} {redact(url)}: cannot be written: {reason}") from error
    # A store may take objects and keep them.
    with contextlib.suppress(Exception):
        fs.rm_file(probe)


def existing_part(path: Path) -> Path:
    """Return a path, or the nearest folder above it that is there."""
    path = path.absolute()
    while not os.path.lexists(path):
        path = path.parent
    return path


def _require_local(path: Path, name: str) -> None:
    existing = existing_part(path)
    where = name if existing == path.absolute() else f"{name}: {existing}"
    if not existing.is_dir():
        raise WriteError(f"{where} is not a folder: give another place")
    try:
        # On Linux this file never gets a name.
        with tempfile.TemporaryFile(dir=existing, prefix=_PROBE):
            pass
    except OSError as error:
        raise WriteError(f"{where} cannot be written: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    """Return why a folder cannot be written, and what to do."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return "permission denied. Have it opened to this user, or give another place"
    if error.errno == errno.EROFS:
        return "the disk is read-only. Mount it for writing, or give another place"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no room is left on it. Make room, or give another place"
    return f"{error.strerror}. Give another place"
