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
from miles.data.source_names import is_path, plain_name
from miles.errors import ConfigError

OPENHERMES = "openhermes"

Line = Callable[[str, str], str]
"""(name, path) -> the call or command that reads the path under the name."""

_OF_A_PATH = re.compile(r"[/\\*?~]|\.[A-Za-z]\w{1,7}$")
"""A slash, a pattern, a suffix such as `.jsonl` or `.gz`; `qwen2.5` is none."""


def require_source(dataset: str, source: str | Sequence[str] | None, line: Line) -> None:
    """Refuse a data set whose files are neither given nor known.

    Raises:
        ConfigError: says what to write, by `line`.
    """
    if dataset == OPENHERMES:
        return
    if source:
        _require_name(dataset, source, line)
        return
    if not _is_path(dataset):
        raise ConfigError(
            f"{shown(dataset)} has no files: {OPENHERMES} is the one data set that is known by its "
            f"name. Name yours, and give its files: {line(dataset or 'rows', 'rows.jsonl')}"
        )
    raise ConfigError(
        f"{shown(dataset)} stands where the name of a data set belongs, and looks like a path. "
        f"Name it, and give the path behind: {line(plain_name(dataset), dataset)}"
    )


def _require_name(dataset: str, source: str | Sequence[str], line: Line) -> None:
    """Refuse a path where the name of a source with files of its own belongs."""
    if not is_path(dataset):
        return
    first = source if isinstance(source, str) else source[0]
    raise ConfigError(
        f"{shown(dataset)} stands where the name of a data set belongs, and looks like a path. For "
        f"the rows of {shown(first)} alone: {line(plain_name(first), first)}. If it is a further "
        "file of the same rows, give it with the others"
    )


def _is_path(dataset: str) -> bool:
    if _OF_A_PATH.search(dataset):
        return True
    return is_utf8(dataset) and "\0" not in dataset and os.path.exists(dataset)
