"""Folders of files whose names matter, and what is taken from them."""

from __future__ import annotations

from pathlib import Path

from miles.data.files.locate import locate


def fill(folder: Path, names: str) -> Path:
    """Make a folder with empty files."""
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def taken(path: Path, root: Path) -> list[str]:
    """Return the files of a path, as paths in a folder."""
    return [str(Path(url).relative_to(root)) for url in locate(str(path)).urls]


def said(path: Path) -> str:
    """Return what is said of the files that are left out."""
    return "; ".join(map(str, locate(str(path)).left_out))
