"""A text about flags -> the same about Python's keywords, for a notebook.

--lr must be positive, not 0            lr must be positive, not 0
there is no flag --lerning-rate         there is no keyword lerning_rate
the same command goes on at step 40     the same call goes on at step 40
"""

from __future__ import annotations

import re

_FLAG = re.compile(r"(?<![\w/-])--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?![\w-])")
_COMMANDS_OWN = {"help", "debug"}
"""Flags of the command line that are no settings."""

_WORDS = (
    (re.compile(r"\bno flag\b"), "no keyword"),
    (re.compile(r"\b(the|[Tt]he) flag\b"), r"\1 keyword"),
    (re.compile(r"\bthe same command\b"), "the same call"),
)


def in_keywords(text: str) -> str:
    """Return a text that speaks of keywords where it spoke of flags."""
    text = _FLAG.sub(_keyword, text)
    for pattern, words in _WORDS:
        text = pattern.sub(words, text)
    return text


def _keyword(flag: re.Match[str]) -> str:
    name = flag[1]
    return flag[0] if name in _COMMANDS_OWN else name.replace("-", "_")
