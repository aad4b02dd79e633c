"""Errors and remedies in a notebook: they speak of Python's arguments, where a command has flags.

    --max-sample-tokens 9000 exceeds …            max_sample_tokens=9000 exceeds …
    --special-text escape keeps such rows         special_text="escape" keeps such rows
    --role-names '{"NAME": "assistant"}'          role_names={"NAME": "assistant"}
    --overwrite                                   overwrite=True

This is the one place that translates. `miles prepare` makes the same objects and translates nothing.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from miles.common.debugging import is_debugging, unchained
from miles.common.flags import Setting, all_settings
from miles.data.config import DataConfig
from miles.errors import MilesError

P = ParamSpec("P")
T = TypeVar("T")

_ARGUMENTS = {
    "--input-key": "messages_key",
    "--tool-key": "tools_key",
    "--apply-chat-template-kwargs": "template_kwargs",
    "--loss-mask-turns": "turns",
    "--rollout-batch-size": "batch_size",
    "--global-batch-size": "batch_size",
    "--rollout-seed": "seed",
    "--rollout-shuffle": "shuffle",
    "--prompt-data": "source",
    "--hf-checkpoint": "tokenizer",
    "--output": "url",
}
"""Flags whose argument has a name of its own; of the others it is the flag's, with underscores."""
_SWITCHES = {"--overwrite": "overwrite", "--trust-remote-code": "trust_remote_code"}
_NOT_HERE = ("--ray-address", "--debug", "--eval-fraction", "--config", "--dry-run")
"""Flags of commands that no argument stands for."""

_FLAG = re.compile(
    r"(?<![\w-])(--[a-z][a-z-]*[a-z])(?: ('\{[^']*\}'|\{[^}]*\}|[\w.,/+-]+(?=:)|[\w.]+))?"
)


def in_python(text: str) -> str:
    """Return a text of ours in which arguments of Python stand for flags."""
    return _FLAG.sub(_argument, text)


def _argument(found: re.Match[str]) -> str:
    flag, value = found[1], found[2]
    if flag in _NOT_HERE:
        return found[0]
    rest = "" if value is None else f" {value}"
    if flag in _SWITCHES:
        return f"{_SWITCHES[flag]}=True{rest}"

    name = _ARGUMENTS.get(flag, flag.removeprefix("--").replace("-", "_"))
    if value is None:
        return f"{name}="
    written = _written(flag, value, is_followed_by_colon=found.string[found.end() :][:1] == ":")
    return f"{name}={rest}" if written is None else f"{name}={written}"


def _written(flag: str, value: str, *, is_followed_by_colon: bool) -> str | None:
    """Return a flag's value as Python writes it; None where the word is no value of it."""
    if value.startswith("'{"):
        return value[1:-1]
    if value.startswith("{") or re.fullmatch(r"\d[\d_]*(\.\d+)?", value):
        return value
    setting = _settings().get(flag)
    is_choice = setting is not None and value in setting.flag.choices
    return f'"{value}"' if is_choice or is_followed_by_colon else None


@functools.cache
def _settings() -> dict[str, Setting]:
    return {setting.flag.name: setting for setting in all_settings(DataConfig)}


def as_in_notebook(error: BaseException) -> None:
    """Have an error speak of Python's arguments, and be shown by a notebook as one paragraph."""
    if isinstance(error, MilesError) and error.args and isinstance(error.args[0], str):
        error.args = (in_python(error.args[0]), *error.args[1:])
    if not is_debugging():
        # IPython shows what this returns in place of the frames.
        shown = [f"{type(error).__name__}: {error}"]
        error._render_traceback_ = lambda: shown  # type: ignore[attr-defined]


def in_notebook(function: Callable[P, T]) -> Callable[P, T]:
    """Have a function of the notebook raise our errors as a notebook shows them best.

    As `unchained` does, it leaves out causes and inner frames. A method's object says by
    `is_in_python` whether a notebook called it, or a command, which speaks of flags.
    """
    plain = unchained(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return plain(*args, **kwargs)
        except (MilesError, KeyboardInterrupt) as error:
            if getattr(args[0] if args else None, "is_in_python", True):
                as_in_notebook(error)
            if is_debugging():
                raise
            raise error.with_traceback(None) from None

    return cast("Callable[P, T]", call)


def identity(text: str) -> str:
    """Return a text as it is: for a command."""
    return text


def say_of(obj: Any) -> Callable[[str], str]:
    """Return how an object of the notebook words what is said of flags."""
    return in_python if obj.is_in_python else identity
