"""A guard: the files of a checkpoint lie in its folder. No name and no link leads out of it."""

from __future__ import annotations

import posixpath
from pathlib import Path

from miles.common import storage
from miles.errors import CheckpointError


def require_inside(url: str, name: str, where: str) -> None:
    """Refuse a name that leads out of a folder, by itself or as a link.

    Args:
        url: the folder.
        name: of a file in it.
        where: the file that holds the name, for the error.

    Raises:
        CheckpointError: names it.
    """
    is_plain = (
        isinstance(name, str) and name == posixpath.basename(name) and name not in ("", ".", "..")
    )
    if is_plain and storage.is_local(url):
        folder = Path(storage.filesystem(url)[1]).resolve()
        is_plain = (folder / name).resolve().parent == folder
    if not is_plain:
        raise CheckpointError(
            f"{where}: {name} leads out of the folder: refused. If it is a link, as in a hub's "
            "cache, make a copy: hf download MODEL --local-dir DIR"
        )
