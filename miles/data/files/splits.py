"""The split of a file, told by its name.

    data/train-00000-of-00002.parquet, split=train/0.parquet   DECLARED: train
    train.jsonl, train/0.parquet, test_02.jsonl                CERTAIN: train, train, test
    chat_test.jsonl, my_train_v2.jsonl                         HINT: test, train
    chat.jsonl, unit-test-generation.jsonl                     NONE

Names are all that is looked at. `split_choice` says which files are read.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from miles.data.file_formats import suffix_of

TRAIN = "train"
HELD_OUT = ("validation", "test")
"""Kinds of splits that are not trained unless they are asked for. The first is evaluated first."""

KINDS: dict[str, str] = {
    "train": TRAIN,
    "training": TRAIN,
    "trainset": TRAIN,
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "heldout": "validation",
    "holdout": "validation",
    "valset": "validation",
    "devset": "validation",
    "test": "test",
    "testing": "test",
    "testset": "test",
    "eval": "test",
    "evaluation": "test",
}
"""A word in a name -> the kind of split that it speaks of."""

_SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]+)?$")
"""The hub's numbers of the files of a split: `NAME-00000-of-00002-0123456789abcdef`."""
_NO_SPLITS = ("data", "part", "shard", "chunk", "file", "rows", "output", "model")
"""Words before such a number that name no split."""
_VERSION = re.compile(r"(?<![A-Za-z0-9])[vV]\d+(?![A-Za-z0-9])")
_NUMBER = re.compile(r"[-_. \d]*$")


class Sign(IntEnum):
    """The certainty with which a name speaks of a split."""

    NONE = 0
    HINT = 1
    """a word of the name does"""
    CERTAIN = 2
    """the whole name of the file, or of a folder, does"""
    DECLARED = 3
    """by a form that nothing but splits have: the hub's, `split=NAME`, a `DatasetDict`'s folder"""


@dataclass(frozen=True)
class FileSplit:
    """The split of a file, as far as its name tells."""

    path: str
    sign: Sign
    name: str
    """as it is written: `train_sft`; "" without a sign"""
    kind: str | None
    """"train", "validation" or "test"; None: a split of another name, or no sign"""
    rest: str
    """the file's name without the word of its split: `chat` for `chat_test.jsonl`"""
    words: frozenset[str]
    """names of the file and its folders, in small letters"""

    @property
    def is_held_out(self) -> bool:
        return self.kind in HELD_OUT

    @property
    def shown(self) -> str:
        """The split as it is named to people."""
        return (self.kind or self.name) if self.sign == Sign.HINT else self.name


@dataclass(frozen=True)
class _Name:
    """The split that the name of a file or of a folder speaks of."""

    sign: Sign
    name: str
    kind: str | None
    rest: str


def splits_of(paths: Sequence[str], others: Collection[str] = ()) -> list[FileSplit]:
    """Return the split of each of the files of a folder.

    Args:
        paths: below the folder.
        others: further files that are there, such as `dataset_dict.json`.
    """
    dict_folders = {
        posixpath.dirname(path)
        for path in others
        if posixpath.basename(path) == "dataset_dict.json"
    }
    return [_split_of(path, dict_folders) for path in paths]


def _split_of(path: str, dict_folders: Collection[str]) -> FileSplit:
    """Return the split of a file.

    Args:
        path: of the file.
        dict_folders: folders of `datasets.DatasetDict.save_to_disk`: each folder in one is a split.
    """
    folder, base = posixpath.split(path)
    base = base[: len(base) - len(suffix_of(base) or "")]
    stem = _SHARD.sub("", base)
    is_of_the_hub = stem != base and stem.lower() not in _NO_SPLITS
    is_in_dict = bool(folder) and posixpath.dirname(folder) in dict_folders

    names = [_read(stem, is_declared=is_of_the_hub)]
    for number, part in enumerate(reversed(folder.split("/"))):
        key, equals, value = part.partition("=")
        if equals and key.lower() == "split":
            names.append(_read(value, is_declared=True))
        elif not equals:
            names.append(_read(part, is_declared=is_in_dict and number == 0))

    words = frozenset(name.name.lower() for name in names)
    found = _surest(names)
    if found is None:
        return FileSplit(path, Sign.NONE, "", None, names[0].rest, words)
    return FileSplit(path, found.sign, found.name, found.kind, found.rest, words)


def _surest(names: Iterable[_Name]) -> _Name | None:
    """Return the name that tells the split; of several as sure, the innermost."""
    names = list(names)
    sure = [name for name in names if name.sign >= Sign.CERTAIN]
    of_a_kind = [name for name in sure if name.kind is not None]
    hints = [name for name in names if name.sign == Sign.HINT]
    return next(iter([*of_a_kind, *sure, *hints]), None)


def _read(name: str, *, is_declared: bool) -> _Name:
    """Return what one name says."""
    plain = _NUMBER.sub("", _VERSION.sub("", name)) or name
    lower = plain.lower()
    if lower in KINDS:
        sign = Sign.DECLARED if is_declared else Sign.CERTAIN
        return _Name(sign, name if is_declared else plain, KINDS[lower], "")

    words = [word for word in re.split(r"[^a-z]+", lower) if word]
    place = _place_of_kind(words)
    kind = None if place is None else KINDS[words[place]]
    rest = "_".join(word for number, word in enumerate(words) if number != place)
    if is_declared:
        return _Name(Sign.DECLARED, name, kind, rest)
    return _Name(Sign.NONE if place is None else Sign.HINT, plain, kind, rest)


def _place_of_kind(words: Sequence[str]) -> int | None:
    """Return which of the words of a name speaks of a split.

    In the middle of a name, `test` speaks of what the rows are about: `unit-test-generation`.
    """
    places = [place for place, word in enumerate(words) if word in KINDS]
    for place in places:
        if KINDS[words[place]] == TRAIN or place in (0, len(words) - 1):
            return place
    return None
