"""Paths -> files, and what is left out of the folders that are named.

    data/              its files of rows, and those below; the rest is left out by name
    s3://b/x*.jsonl    the files that match
    a/b.json           that file, whatever its name

No file is opened; the filesystem is only asked which files there are. Which file of a folder holds
rows is decided here, for all commands, by names alone (`file_formats`):

    a.parquet b.jsonl README.md .git/    a.parquet   Parquet: JSON beside it describes the data
    a.jsonl B.JSONL state.json c.csv     a.jsonl B.JSONL
    train.jsonl test.jsonl               train.jsonl   unless --split says another (`split_choice`)
    train.jsonl test.parquet             train.jsonl   the split is told before the format
    a.jsonl b.jsonl -> a.jsonl           a.jsonl       a file is read once, whatever links there are
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from miles.common import patterns
from miles.common.counts import counted
from miles.common.patterns import Found
from miles.common.shown import cut
from miles.data.file_formats import (
    is_sidecar,
    known_suffixes,
    of_one_family,
    remedy_for,
    suffix_of,
)
from miles.data.files.left_out import LeftOut, merged
from miles.data.files.split_choice import ALL, choose
from miles.data.files.splits import FileSplit, Sign, splits_of
from miles.errors import MissingFileError, SourceError

_MOST_SPLITS = 8
_SPLIT_CHARACTERS = 40
_SAME_CHARACTERS = 80
_UNKNOWN = "of an unknown format"


@dataclass(frozen=True)
class Located:
    """The files of a path."""

    urls: tuple[str, ...]
    """sorted"""
    left_out: tuple[LeftOut, ...] = ()
    """of a folder, or of what matches a pattern"""


def locate(path: str, split: str | None = None, *, is_evaluation: bool = False) -> Located:
    """Return the files that a path, glob or folder names, and what is left out.

    A file that is named by its own name is taken. From a folder, those of one family of formats and
    of one split are taken.

    Args:
        path: fsspec URL.
        split: names of splits, or "all"; None: what the use asks for.
        is_evaluation: the rows are evaluated, not trained on.

    Raises:
        SourceError: nothing is there, nothing of it holds rows, or it cannot be listed; or no file
            is of the split, or for training only held-out ones are.
    """
    if not path:
        raise SourceError("the path of the rows is empty, such as a variable that is not set")
    found = patterns.find(path)
    if found.is_file and split is None:
        return Located(tuple(patterns.urls_of(path, found.files)))

    def below(names: Sequence[str]) -> list[str]:
        return [_below(name, found.root) for name in names]

    names = below(found.files)
    rows = names
    left_out: list[LeftOut] = []
    if not found.is_file:
        rows, left_out = _files_of_rows(names)
        left_out.append(LeftOut.of("hidden", below(found.hidden), False))
        left_out.append(LeftOut.of("in a folder that is there twice", below(found.repeated), False))
    if not rows:
        left_out = [group for group in left_out if group.num_files]
        raise _nothing(path, left_out, len(found.folders), is_folder=found.is_folder)

    splits = splits_of(rows, names)
    if found.is_folder:
        splits = _candidates(splits, is_asked_for=split not in (None, ALL))
    choice = choose(splits, split, path, is_evaluation=is_evaluation)
    taken = [chosen.path for chosen in choice.taken]
    if found.is_folder:  # a pattern says itself which formats are read
        taken = of_one_family(taken)
        others = set(rows) - set(taken) - {other.path for other in choice.left}
        left_out.append(LeftOut.of("in another format than the others", others, True))
    taken, twice = _read_once(taken, found)

    wanted = set(taken)
    files = [name for name in found.files if _below(name, found.root) in wanted]
    left_out = [group for group in (*_of_splits(choice.left), *left_out, *twice) if group.num_files]
    return Located(tuple(patterns.urls_of(path, files)), merged(left_out))


def _candidates(splits: Sequence[FileSplit], *, is_asked_for: bool) -> list[FileSplit]:
    """Return those files of a folder between which the split decides.

    The split is told before the format: a test set may have another one. A file whose name speaks
    of no split, in another format than the others, describes them, and is none.

    Args:
        is_asked_for: a split is named, which may be a file's name.
    """
    of_the_format = set(of_one_family([split.path for split in splits]))
    return [
        split
        for split in splits
        if is_asked_for or split.path in of_the_format or split.sign != Sign.NONE
    ]


def _read_once(names: Sequence[str], found: Found) -> tuple[list[str], list[LeftOut]]:
    """Divide files into those that are read, and those that lead to the same ones by a link."""
    if not found.links:
        return list(names), []
    root = found.root.rstrip("/")
    links = {_below(link, found.root) for link in found.links}
    kept: dict[str, str] = {}
    twice: dict[str, str] = {}
    for name in sorted(names, key=lambda name: (name in links, name)):
        place = os.path.realpath(f"{root}/{name}")
        if place in kept:
            twice[name] = kept[place]
        else:
            kept[place] = name

    first = next(iter(twice.values()), "")
    same = cut(first, _SAME_CHARACTERS) if set(twice.values()) == {first} else "others"
    taken = [name for name in names if name not in twice]
    return taken, [LeftOut.of(f"the same file as {same}, by a link", twice, True)]


def _of_splits(left: Sequence[FileSplit]) -> list[LeftOut]:
    """Return what is said of the files of other splits."""
    by_reason: dict[str, list[str]] = {}
    for split in left:
        reason = f"of split {cut(split.shown, _SPLIT_CHARACTERS)}" if split.sign else "of no split"
        if reason not in by_reason and len(by_reason) == _MOST_SPLITS:
            reason = "of other splits"
        by_reason.setdefault(reason, []).append(split.path)
    return [LeftOut.of(reason, paths, True) for reason, paths in by_reason.items()]


def _files_of_rows(names: Sequence[str]) -> tuple[list[str], list[LeftOut]]:
    """Divide files by their names into those with rows, and those that are left out and why."""
    sidecars = [name for name in names if is_sidecar(name)]
    candidates = sorted(set(names) - set(sidecars))
    rows = [name for name in candidates if suffix_of(name) is not None]
    unknown = sorted(set(candidates) - set(rows))

    return rows, [
        LeftOut.of(_UNKNOWN, unknown, True),
        LeftOut.of("known to hold no rows", sidecars, False),
    ]


def _nothing(
    path: str, left_out: Sequence[LeftOut], num_folders: int, *, is_folder: bool
) -> SourceError:
    """Return the error where no file can be taken.

    Args:
        num_folders: that match the path, a pattern.
    """
    expected = f"expected a name that ends in {known_suffixes()}"
    if num_folders and not left_out:
        return MissingFileError(
            f"{path}: no such file; the pattern matches {counted(num_folders, 'folder')}. For what is in "
            f"them and below: '{path.rstrip('/')}/**/*'"
        )

    if not left_out and is_folder:
        return MissingFileError(
            f"{path}: no such file; the folder is empty. Put the files there, or name another; "
            f"{expected}"
        )
    if not left_out:
        return MissingFileError(f"{path}: no such file; nothing is there; {expected}")

    found = "; ".join(map(str, left_out))
    unknown = [group.names[0] for group in left_out if group.reason == _UNKNOWN]
    remedy = f". {unknown[0]}: {remedy_for(unknown[0])}" if unknown else ""
    return SourceError(f"{path}: holds no file of rows, only {found}; {expected}{remedy}")


def _below(name: str, root: str) -> str:
    """Return a path as it is written below a folder."""
    return name.removeprefix(f"{root.rstrip('/')}/")
