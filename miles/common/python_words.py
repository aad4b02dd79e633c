"""A text about a command's flags -> the same about a function's arguments, for a notebook.

    --max-sample-tokens 9000 exceeds …            max_sample_tokens=9000 exceeds …
    --special-text escape keeps such rows         special_text="escape" keeps such rows
    --role-names '{"NAME": "assistant"}'          role_names={"NAME": "assistant"}
    --overwrite                                   overwrite=True
    there is no flag --lerning-rate               there is no keyword lerning_rate=
    the same command goes on at step 40           the same call goes on at step 40

This is the one place that translates. A command makes the same texts and translates nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from miles.common.flags import Setting

_PATH = r"(?:\w+://|/)[^\s:;]*[\w/]"
_NUMBER = r"-?\d[\d_]*(?:\.\d+)?(?:e[-+]?\d+)?"
_FUNCTION = r"[\w.]+:[\w.<>]*[\w>]"
_FLAG = re.compile(
    r"(?<![\w/-])(--[a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?![\w-])"
    rf"(?: ('\{{[^']*\}}'|\{{[^}}]*\}}|{_PATH}|{_FUNCTION}|{_NUMBER}(?!\w)|[\w.,/+:-]+(?=:\s)|[\w.]*\w))?"
)
_COMMANDS_OWN = frozenset(("--help", "--debug"))
"""Flags of every command that are no settings."""
_WORDS = (
    (re.compile(r"\bno flag\b"), "no keyword"),
    (re.compile(r"\b([Tt]he) flag\b"), r"\1 keyword"),
    (re.compile(r"\bthe same command\b"), "the same call"),
)


@dataclass(frozen=True)
class Arguments:
    """The arguments of a function, where its command has flags."""

    settings: Callable[[], Mapping[str, Setting]]
    """returns what is declared of each flag"""
    names: Mapping[str, str] = field(default_factory=dict)
    """flag -> the argument's name, where it is not the flag's with underscores"""
    switches: frozenset[str] = frozenset()
    """flags that texts tell the reader to give"""
    flags_only: frozenset[str] = frozenset()
    """flags of the command that no argument stands for"""


def in_python(text: str, arguments: Arguments) -> str:
    """Return a text that speaks of arguments where it spoke of flags."""
    text = _FLAG.sub(lambda found: _argument(found, arguments), text)
    for pattern, words in _WORDS:
        text = pattern.sub(words, text)
    return text


def _argument(found: re.Match[str], arguments: Arguments) -> str:
    """Return what stands for a flag and the word behind it, which may be its value."""
    flag, value = found[1], found[2]
    if flag in _COMMANDS_OWN or flag in arguments.flags_only:
        return found[0]
    name = arguments.names.get(flag, flag.removeprefix("--").replace("-", "_"))
    rest = "" if value is None else f" {value}"
    if flag in arguments.switches:
        return f"{name}=True{rest}"
    if value is None:
        return f"{name}="

    is_followed_by_colon = found.string.startswith(": ", found.end())
    # The one name that an error proposes.
    if found.string.endswith("Take it: ", 0, found.start()):
        return f'{name}="{value}"'
    setting = arguments.settings().get(flag)
    written = _written(value, setting, is_followed_by_colon=is_followed_by_colon)
    return f"{name}={rest}" if written is None else f"{name}={written}"


def _written(value: str, setting: Setting | None, *, is_followed_by_colon: bool) -> str | None:
    """Return a flag's value as Python writes it; None where the word is no value of it."""
    if value.startswith("'{"):
        return value[1:-1]
    if value.startswith("{") or re.fullmatch(_NUMBER, value):
        return value
    is_choice = setting is not None and value in setting.flag.choices
    is_one_word = re.fullmatch(f"{_PATH}|{_FUNCTION}", value) is not None
    return f'"{value}"' if is_choice or is_one_word or is_followed_by_colon else None
