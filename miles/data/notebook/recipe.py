"""The first word of `prepare`: the name of a recipe or of a source, and never a path.

prepare("chat", source="chat.jsonl")   the files are called chat in ledgers and metrics
prepare("openhermes")                  the recipe knows where its files are
prepare("chat.jsonl")                  refused: the error has the line above
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

from miles.common.local_paths import is_utf8
from miles.common.shown import shown
from miles.errors import ConfigError

OPENHERMES = "openhermes"

Line = Callable[[str, str], str]
"""(name, path) -> the call or command that reads the path under the name."""

_OF_A_PATH = re.compile(r"[/\\*?~]|\.[A-Za-z]\w{1,7}$")
"""A slash, a pattern, a suffix such as `.jsonl` or `.gz`; `qwen2.5` is none."""
_NO_PART_OF_A_NAME = re.compile(r"[^A-Za-z0-9_-]+")


def require_source(dataset: str, source: str | Sequence[str] | None, line: Line) -> None:
    """Refuse a data set whose files are neither given nor known.

    Raises:
        ConfigError: says what to write, by `line`.
    """
    if dataset == OPENHERMES or source:
        return
    if not _is_path(dataset):
        raise ConfigError(
            f"{shown(dataset)} has no files: {OPENHERMES} is the one data set that is known by its "
            f"name. Name yours, and give its files: {line(dataset or 'rows', 'rows.jsonl')}"
        )
    raise ConfigError(
        f"{shown(dataset)} stands where the name of a data set belongs, and looks like a path. "
        f"Name it, and give the path behind: {line(_name_of(dataset), dataset)}"
    )


def _is_path(dataset: str) -> bool:
    if _OF_A_PATH.search(dataset):
        return True
    return is_utf8(dataset) and "\0" not in dataset and os.path.exists(dataset)


def _name_of(path: str) -> str:
    """Return a name for the rows of a path: `s3://b/chat.jsonl.gz` -> `chat`."""
    last = path.rstrip("/").rsplit("/", 1)[-1].split(".")[0]
    return _NO_PART_OF_A_NAME.sub("-", last).strip("-") or "rows"
