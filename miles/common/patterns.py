"""A path as it is typed -> the files that it names: a file, a folder, or a pattern.

data/                 the files of a known format in the folder and below
s3://b/x*.jsonl       the files that match
run[1]/rows[v2].json  the file of that very name, where there is one, before the pattern
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import fsspec
from fsspec.utils import glob_translate

from miles.common import retry, storage
from miles.common.folder_walk import walk
from miles.common.local_paths import is_utf8
from miles.common.near_names import meant_path
from miles.common.shown import shown
from miles.errors import MissingFileError, SourceError


@dataclass(frozen=True)
class Found:
    """The files that a path names, and their neighbours. All are paths on its filesystem."""

    root: str
    """the folder that is named, or the part of a pattern before its first sign; of a file, its
    folder"""
    is_file: bool
    """a file is named, by its own name"""
    is_folder: bool
    files: tuple[str, ...]
    hidden: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    """that match a pattern; what is in them is not taken"""
    links: tuple[str, ...] = ()
    """files that are links to files; further ones than `files` may be among them"""


def find(url: str, *, with_links: bool = True) -> Found:
    """Return what a path, a glob or a folder names.

    Args:
        url: a file, a folder, or a pattern (`*`, `?`, `[`) where nothing has that very name. What
            is in a folder and its sub-folders is taken, except names that begin with a dot or an
            underscore; so with a pattern, unless it spells such a name.
        with_links: follow links to folders.

    Raises:
        MissingFileError: nothing is there.
        SourceError: it may not be listed.
    """
    fs, path = storage.filesystem(url)
    fs.invalidate_cache()  # a notebook's process lives long
    with storage.reading(url):
        kind = storage.type_of(url)

        if kind == "directory":
            inside = walk(fs, path, with_links=with_links)
            lists = (inside.files, inside.hidden, inside.repeated)
            return Found(path, False, True, *lists, links=inside.links)
        if kind is not None:
            return Found(path.rsplit("/", 1)[0], True, False, (path,))
        if storage.MAGIC.search(path):
            return _glob(fs, path, with_links)

    if storage.is_local(url) and os.path.islink(path):
        target = shown(os.readlink(path))
        raise MissingFileError(f"{url}: no such file: it is a link to {target}, which is not there")
    near = meant_path(path) if storage.is_local(url) else ""
    raise MissingFileError(f"{url}: no such file{near}")


def expand(url: str, suffixes: Sequence[str]) -> list[str]:
    """Return the files that a path, a glob or a folder names, sorted, as URLs.

    Args:
        url: as for `find`; links to folders are not followed.
        suffixes: from a folder, files with one of them are taken, such as (".parquet",).

    Raises:
        MissingFileError: nothing is there.
        SourceError: it may not be listed.
    """
    found = find(url, with_links=False)
    names = [name for name in found.files if not found.is_folder or name.endswith(tuple(suffixes))]
    if not names:
        raise MissingFileError(f"{url}: no such file; nothing with {', '.join(suffixes)} is there")
    return urls_of(url, names)


def urls_of(url: str, names: Sequence[str]) -> list[str]:
    """Return the URLs of paths on the filesystem of a URL, sorted.

    Raises:
        SourceError: a name is not UTF-8.
    """
    for name in names:
        if not is_utf8(name):
            raise SourceError(f"{name!a}: its name is not UTF-8; rename it")
    fs, _ = storage.filesystem(url)
    if storage.is_local(url):
        return sorted(names)
    return sorted(str(fs.unstrip_protocol(name)) for name in names)


def _glob(fs: fsspec.AbstractFileSystem, pattern: str, with_links: bool) -> Found:
    """Return what matches a pattern. A folder that is there is no pattern: `run[1]/*.jsonl`."""
    parts = pattern.split("/")
    fixed = 0
    while fixed < len(parts) - 1 and _is_literal(fs, parts[: fixed + 1]):
        fixed += 1

    folder = "/".join(parts[:fixed]) or fs.root_marker
    depth = None if "**" in parts else len(parts) - fixed
    spells_hidden = any(part.startswith((".", "_")) for part in parts[fixed:])

    def may_match_below(inner: str) -> bool:
        for name, part in zip(inner.split("/")[fixed:], parts[fixed:], strict=False):
            if part == "**":
                return True
            if not fnmatch.fnmatchcase(name, part):
                return False
        return True

    inside = walk(
        fs,
        folder,
        depth,
        with_hidden=spells_hidden,
        with_links=with_links,
        is_wanted=may_match_below,
    )

    matched = "/".join([glob.escape("/".join(parts[:fixed])), *parts[fixed:]])
    is_match = re.compile(glob_translate(matched)).match
    return Found(
        folder,
        False,
        False,
        tuple(filter(is_match, inside.files)),
        tuple(filter(is_match, inside.hidden)),
        inside.repeated,
        tuple(filter(is_match, inside.folders)),
        inside.links,
    )


def _is_literal(fs: fsspec.AbstractFileSystem, parts: Sequence[str]) -> bool:
    """Return whether the last of some names is no pattern, or a folder has that very name."""
    if not storage.MAGIC.search(parts[-1]):
        return True
    folder = "/".join(parts)
    return bool(retry.call(lambda: fs.isdir(folder), str(fs.unstrip_protocol(folder))))
