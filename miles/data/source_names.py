"""The words of `--prompt-data` -> named paths; and the words that cannot be the name of a source.

rows/chat.jsonl                  ("chat", "rows/chat.jsonl")
'rows/*.jsonl'                   ("rows", "rows/*.jsonl")
chat a.jsonl code b.jsonl        ("chat", "a.jsonl"), ("code", "b.jsonl")
a.jsonl b.jsonl                  refused: a.jsonl is no name
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence

from miles.common.counts import counted
from miles.common.local_paths import is_utf8
from miles.common.shown import shown
from miles.data.file_formats import suffix_of
from miles.errors import ConfigError

_PATTERN = re.compile(r"[*?]")
_SIGN = re.compile(r"[*?[]")
_ENDS = " -_."
_NO_PART_OF_A_NAME = re.compile(r"[^A-Za-z0-9_-]+")


def name_of(path: str) -> str:
    """Return the name of the source of a path: that of its file or folder.

    Of a pattern, the name is what stands before its first `*` or `?`.
    """
    *folders, last = path.rstrip("/").split("/")
    if not _PATTERN.search(last):
        return last.split(".")[0] or "data"

    for part in reversed([*folders, last]):
        fixed = _PATTERN.split(part, maxsplit=1)[0]
        if fixed.endswith(":"):
            break
        stem = fixed if fixed == part else fixed.rstrip(_ENDS)
        if name := stem.split(".")[0]:
            return name
    return "data"


def plain_name(path: str) -> str:
    """Return the name that an error proposes for a path: `s3://b/c d.jsonl` -> `c-d`."""
    return _NO_PART_OF_A_NAME.sub("-", name_of(path)).strip("-") or "rows"


def is_path(word: str) -> bool:
    """Return whether a word is a path by its form: it has a slash, a `~`, or a data suffix."""
    return "/" in word or "\\" in word or word.startswith("~") or suffix_of(word) is not None


def named_paths(flag: str, words: Sequence[str]) -> list[tuple[str, str]]:
    """Return the sources that the words of a flag name, each with its path.

    Raises:
        ConfigError: a path stands where a name belongs, or words are missing.
    """
    if len(words) == 1:
        return [(name_of(words[0]), words[0])]

    pairs = list(zip(words[::2], words[1::2], strict=False))
    for name in words[::2]:
        if is_path(name):
            raise ConfigError(_two_meanings(flag, words, f"{shown(name)} is a path, and stands"))
    for name, path in pairs:
        if name not in (name_of(path), *path.split("/")) and _exists(name):
            here = f"a file or folder {name} is here, and it stands"
            raise ConfigError(
                f"{_two_meanings(flag, words, here)}. If {name} is the name for {path}, type the "
                f"line in a folder that holds no {name}"
            )
    if len(words) % 2:
        raise ConfigError(f"{flag} takes one path, or NAME PATH pairs; found {len(words)} words")
    return pairs


def splits_for(splits: Sequence[str], num_sources: int) -> list[str | None]:
    """Return the word of `--split` for each source: one for all of them, or one each.

    Raises:
        ConfigError: another number of words.
    """
    if len(splits) not in (0, 1, num_sources):
        raise ConfigError(
            f"--split gives {len(splits)} words for {counted(num_sources, 'source')}: give one for all, or "
            "one for each; several splits of a source are written with a plus, train+validation"
        )
    if len(splits) <= 1:
        return [splits[0] if splits else None] * num_sources
    return list(splits)


def _two_meanings(flag: str, words: Sequence[str], found: str) -> str:
    """Return the error where a path stands in the place of a name, with both lines to type."""
    first = words[0]
    second = words[1]
    names = [plain_name(first), plain_name(second)]
    if names[0] == names[1]:
        names = [f"{names[0]}-1", f"{names[1]}-2"]
    pairs = shlex.join([names[0], first, names[1], second])
    more = " …" if len(words) > 2 else ""

    together = _pattern_of(words)
    if together:
        one_source = f"For files of one source, give a pattern in quotes: {flag} {together}"
    else:
        one_source = "For files of one source, put them into a folder of their own, and give that"
    return (
        f"{flag} {shlex.join(words[:2])}{more}: {found} where the name of a source belongs. For "
        f"sources of their own, name each: {flag} {pairs}{more}. {one_source}"
    )


def _pattern_of(words: Sequence[str]) -> str:
    """Return a pattern, in quotes, that matches some local files and no others; "": there is none.

    It is that of a folder's files with one suffix.
    """
    folders = {os.path.dirname(word) for word in words}
    suffixes = {suffix_of(word) for word in words}
    if len(folders) != 1 or len(suffixes) != 1 or None in suffixes:
        return ""
    (folder,) = folders
    (suffix,) = suffixes
    if _SIGN.search(folder):
        return ""

    try:
        names = os.listdir(folder or ".")
    except (OSError, ValueError):  # in a store, or not there
        return ""

    matched = {
        name for name in names if name.endswith(f"{suffix}") and not name.startswith(("_", "."))
    }
    if matched != {os.path.basename(word) for word in words}:
        return ""
    return shlex.quote(f"{folder or '.'}/*{suffix}")


def _exists(name: str) -> bool:
    return is_utf8(name) and "\0" not in name and os.path.exists(name)
