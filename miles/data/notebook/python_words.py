"""Errors and remedies of `prepare` and what it returns, in a notebook: they speak of arguments.

    --input-key chat: no such column     messages_key="chat": no such column

`miles prepare` makes the same objects, and speaks of flags.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar, cast

from miles.common import python_words
from miles.common.debugging import is_debugging, unchained
from miles.common.flags import Setting, all_settings
from miles.data.config import DataConfig
from miles.errors import MilesError

P = ParamSpec("P")
T = TypeVar("T")


@functools.cache
def _settings() -> Mapping[str, Setting]:
    return {setting.flag.name: setting for setting in all_settings(DataConfig)}


_ARGUMENTS = python_words.Arguments(
    _settings,
    names={
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
    },
    switches=frozenset(("--overwrite", "--trust-remote-code")),
    flags_only=frozenset(("--ray-address", "--eval-fraction", "--config", "--dry-run")),
)


def in_python(text: str) -> str:
    """Return a text of ours in which arguments of `prepare` and `write` stand for flags."""
    return python_words.in_python(text, _ARGUMENTS)


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
