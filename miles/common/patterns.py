"""A path as it is typed -> the files that it names: a file, a folder, or a pattern.

data/                 the files of a known format in the folder and below
s3://b/x*.jsonl       the files that match
run[1]/rows[v2].json  the file of that very name, where there is one, before the pattern
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence

import fsspec
from fsspec.utils import glob_translate

from miles.common import retry, storage
from miles.common.local_paths import is_utf8
from miles.errors import MissingFileError, SourceError


def expand(url: str, suffixes: Sequence[str]) -> list[str]:
    """Return the files that a path, a glob or a folder names, sorted, as URLs.

    Args:
        url: a file, a folder, or a pattern (`*`, `?`, `[`) where nothing has that very name. From a
            folder and its sub-folders, the files with one of `suffixes` are taken, except names
            that begin with a dot or an underscore.
        suffixes: such as (".parquet", ".jsonl.gz").

    Raises:
        MissingFileError: nothing is there.
        SourceError: it may not be listed.
    """
    fs, path = storage.filesystem(url)
    fs.invalidate_cache()  # a notebook's process lives long
    with storage.reading(url):
        kind = storage.type_of(url)
        if kind is None and storage.MAGIC.search(path):
            names = _glob(fs, path)
        elif kind == "directory":
            files = storage.files_below(fs, path, visible=True)
            names = [name for name in files if name.endswith(tuple(suffixes))]
        else:
            names = [path] if kind is not None else []

    if not names:
        raise MissingFileError(f"{url}: no such file; nothing with {', '.join(suffixes)} is there")
    for name in names:
        if not is_utf8(str(name)):
            raise SourceError(f"{name!a}: its name is not UTF-8; rename it")
    if storage.is_local(url):
        return sorted(map(str, names))
    return sorted(str(fs.unstrip_protocol(name)) for name in names)


def _glob(fs: fsspec.AbstractFileSystem, pattern: str) -> list[str]:
    """Return the files that match a pattern. A folder that is there is no pattern: `run[1]/*.jsonl`."""
    parts = pattern.split("/")
    fixed = 0
    while fixed < len(parts) - 1 and _is_literal(fs, parts[: fixed + 1]):
        fixed += 1

    folder = "/".join(parts[:fixed])
    depth = None if "**" in parts else len(parts) - fixed
    is_match = re.compile(glob_translate("/".join([glob.escape(folder), *parts[fixed:]]))).match
    return [
        name for name in storage.files_below(fs, folder or fs.root_marker, depth) if is_match(name)
    ]


def _is_literal(fs: fsspec.AbstractFileSystem, parts: Sequence[str]) -> bool:
    """Return whether the last of some names is no pattern, or a folder has that very name."""
    if not storage.MAGIC.search(parts[-1]):
        return True
    folder = "/".join(parts)
    return bool(retry.call(lambda: fs.isdir(folder), str(fs.unstrip_protocol(folder))))
