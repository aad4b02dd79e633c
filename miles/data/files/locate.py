"""Paths -> files, and what is left out of the folders that are named.

    data/              its files of rows, and those below; the rest is left out by name
    s3://b/x*.jsonl    the files that match
    a/b.json           that file, whatever its name

No file is opened; the filesystem is only asked which files there are. Which file of a folder holds
rows is decided here, for all commands, by names alone (`file_formats`):

    a.parquet b.jsonl README.md .git/    a.parquet   Parquet: JSON beside it describes the data
    a.jsonl B.JSONL state.json c.csv     a.jsonl B.JSONL
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from miles.common import patterns
from miles.data.file_formats import FORMATS as FORMATS
from miles.data.file_formats import family_of, is_sidecar, suffix_of
from miles.data.file_formats import format_of as format_of
from miles.data.files.left_out import LeftOut, merged
from miles.errors import MissingFileError, SourceError


@dataclass(frozen=True)
class Located:
    """The files of a path."""

    urls: tuple[str, ...]
    """sorted"""
    left_out: tuple[LeftOut, ...] = ()
    """of a folder, or of what matches a pattern"""


def locate(path: str) -> Located:
    """Return the files that a path, glob or folder names, and what is left out.

    A file that is named by its own name is taken. From a folder, those of one family of formats are
    taken.

    Raises:
        SourceError: nothing is there, nothing of it holds rows, or it cannot be listed.
    """
    if not path:
        raise SourceError("the path of the rows is empty, such as a variable that is not set")
    found = patterns.find(path)
    if found.is_file:
        return Located(tuple(patterns.urls_of(path, found.files)))

    def below(names: Sequence[str]) -> list[str]:
        return [_below(name, found.root) for name in names]

    taken, left_out = _files_of_rows(below(found.files), is_folder=found.is_folder)
    left_out.append(LeftOut.of("hidden", below(found.hidden), False))
    left_out.append(LeftOut.of("in a folder that is there twice", below(found.repeated), False))
    left_out = [group for group in left_out if group.num_files]

    if not taken:
        raise _nothing(path, left_out)
    wanted = set(taken)
    names = [name for name in found.files if _below(name, found.root) in wanted]
    return Located(tuple(patterns.urls_of(path, names)), merged(left_out))


def _files_of_rows(names: Sequence[str], *, is_folder: bool) -> tuple[list[str], list[LeftOut]]:
    """Divide files by their names into those with rows, and those that are left out and why.

    Args:
        is_folder: a folder was named: then only one family of formats is taken. A pattern says
            itself which.
    """
    sidecars = [name for name in names if is_sidecar(name)]
    candidates = sorted(set(names) - set(sidecars))
    rows = [name for name in candidates if suffix_of(name) is not None]
    unknown = sorted(set(candidates) - set(rows))

    taken = rows
    if is_folder and rows:
        first = min(map(family_of, rows))
        taken = [name for name in rows if family_of(name) == first]
    beside = sorted(set(rows) - set(taken))

    return taken, [
        LeftOut.of("in another format than the others", beside, True),
        LeftOut.of("of an unknown format", unknown, True),
        LeftOut.of("known to hold no rows", sidecars, False),
    ]


def _nothing(path: str, left_out: Sequence[LeftOut]) -> SourceError:
    """Return the error where no file can be taken."""
    expected = f"expected a name that ends in {', '.join(FORMATS)}"
    if not left_out:
        return MissingFileError(f"{path}: no such file; nothing is there; {expected}")
    found = "; ".join(map(str, left_out))
    return SourceError(f"{path}: holds no file of rows, only {found}; {expected}")


def _below(name: str, root: str) -> str:
    """Return a path as it is written below a folder."""
    return name.removeprefix(f"{root.rstrip('/')}/")
