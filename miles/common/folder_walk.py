"""The files of a folder and its sub-folders, and what is passed over there.

    data/a.jsonl, data/en/b.jsonl    files
    data/mount -> /store/x           its files, as data/mount/…: a link to a folder is followed
    data/up -> ..                    passed over: it leads back
    data/.git/, data/_SUCCESS        passed over: hidden

Folders come before links, so that a folder which has two ways to it is taken where it really is.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import fsspec
from fsspec.implementations.local import LocalFileSystem

from miles.common import retry


@dataclass(frozen=True)
class Walk:
    """The names in a folder and below it. All are paths on its filesystem."""

    files: tuple[str, ...]
    folders: tuple[str, ...]
    """those that are not hidden, links to folders among them"""
    hidden: tuple[str, ...]
    """files and folders whose name begins with a dot or an underscore; a folder's ends with a
    slash"""
    repeated: tuple[str, ...]
    """links and folders that lead to a folder whose files are taken already, or to one above"""
    links: tuple[str, ...] = ()
    """files that are links to files"""


@dataclass(frozen=True)
class _Entry:
    """One name in a folder."""

    name: str
    is_folder: bool
    is_link: bool
    """a link to a folder"""
    is_file_link: bool = False

    @property
    def is_hidden(self) -> bool:
        return self.name.rsplit("/", 1)[-1].startswith((".", "_"))

    @property
    def shown(self) -> str:
        return f"{self.name}/" if self.is_folder else self.name


def walk(
    fs: fsspec.AbstractFileSystem,
    root: str,
    depth: int | None = None,
    *,
    with_hidden: bool = False,
    with_links: bool = True,
    is_wanted: Callable[[str], bool] = lambda folder: True,
) -> Walk:
    """List a folder. fsspec's own `walk` skips silently what it cannot list.

    Args:
        depth: levels to go down; None: all.
        with_hidden: take hidden names like the others.
        with_links: follow links to folders.
        is_wanted: whether to look into a folder.
    """
    files: list[str] = []
    inner_folders: list[str] = []
    hidden: list[str] = []
    repeated: list[str] = []
    file_links: list[str] = []
    is_local = isinstance(fs, LocalFileSystem)
    real_root = os.path.realpath(root) if is_local else ""
    seen: set[str] = set()
    folders = deque([(root, depth)])
    links: deque[tuple[str, int | None]] = deque()

    while folders or links:
        folder, levels = (folders or links).popleft()
        if is_local:
            place = os.path.realpath(folder)
            if place in seen or (folder != root and _holds(place, real_root)):
                repeated.append(f"{folder}/")
                continue
            seen.add(place)

        for entry in _entries(fs, folder):
            if entry.is_hidden and not with_hidden:
                hidden.append(entry.shown)
            elif not entry.is_folder:
                files.append(entry.name)
                if entry.is_file_link:
                    file_links.append(entry.name)
            else:
                inner_folders.append(entry.name)
                inner = (entry.name, None if levels is None else levels - 1)
                is_followed = levels != 1 and (with_links or not entry.is_link)
                if is_followed and is_wanted(entry.name):
                    (links if entry.is_link else folders).append(inner)

    lists = (files, inner_folders, hidden, repeated, file_links)
    return Walk(*(tuple(sorted(names)) for names in lists))


def _entries(fs: fsspec.AbstractFileSystem, folder: str) -> list[_Entry]:
    """Return what is in a folder, by name."""
    listed = retry.call(lambda: fs.ls(folder, detail=True), str(fs.unstrip_protocol(folder)))
    entries = []
    for entry in listed:
        name = str(entry["name"]).rstrip("/")
        # A store lists a folder's own marker as an entry of it.
        if name == folder.rstrip("/") or not name.rsplit("/", 1)[-1]:
            continue
        is_any_link = bool(entry.get("islink"))
        is_link = is_any_link and entry["type"] != "directory" and fs.isdir(name)
        is_folder = is_link or entry["type"] == "directory"
        entries.append(_Entry(name, is_folder, is_link, is_any_link and not is_folder))
    return sorted(entries, key=lambda entry: entry.name)


def _holds(folder: str, inner: str) -> bool:
    """Return whether a folder is another one, or lies above it."""
    return f"{inner.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")
