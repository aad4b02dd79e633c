"""Arguments of the notebook's functions: each is compared with its annotation when they are called.

    prepare(source=5, tokenizer="/models/Qwen3-4B")
    ConfigError: prepare: source must be a text, a sequence of texts or None, not 5 (int)

A path may be given as `pathlib.Path`; it becomes a text. numpy's numbers are numbers.
"""

from __future__ import annotations

import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

from miles.common.near_names import did_you_mean
from miles.common.shown import shown
from miles.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Have a public function refuse arguments of a wrong type before it does anything.

    Annotations that are no plain types, such as a tokenizer's, are left to the function.
    """
    plain = inspect.unwrap(function)
    signature = inspect.signature(plain)
    positional = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    required = {
        name
        for name, parameter in signature.parameters.items()
        if parameter.default is parameter.empty
    }

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        named = {**dict(zip(positional, args, strict=False)), **kwargs}
        is_complete = len(named) == len(args) + len(kwargs) and required <= named.keys()
        if is_complete and _are_sound(plain, named):  # most calls
            return function(*args, **kwargs)

        given = _bound(plain.__name__, signature, args, kwargs)
        for name, value in given.arguments.items():
            expected = _hints_of(plain).get(name, Any)
            given.arguments[name] = value = _plain(value, expected)
            if not _accepts(value, expected):
                raise ConfigError(
                    f"{plain.__name__}: {name} must be {' or '.join(_words(expected))}, not "
                    f"{shown(value)} ({type(value).__name__})"
                )
        return function(*given.args, **given.kwargs)

    return call


def _bound(
    name: str, signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    """Return the arguments of a call by name.

    Raises:
        ConfigError: an argument is missing, or there is no such argument.
    """
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        known = [argument for argument in signature.parameters if argument != "self"]
        otherwise = f"its arguments are {', '.join(known)}"
        unknown = [argument for argument in kwargs if argument not in known]
        hint = did_you_mean(unknown[0], known, otherwise) if unknown else f"; {otherwise}"
        raise ConfigError(f"{name}: {error}{hint}") from None


@functools.cache
def _hints_of(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Return a function's annotations; what is imported for the type checker alone is Any."""
    unknown: dict[str, Any] = {}
    while True:
        try:
            return typing.get_type_hints(function, localns=unknown)
        except NameError as error:
            unknown[str(error.name)] = Any


def _are_sound(function: Callable[..., Any], named: Mapping[str, Any]) -> bool:
    """Return whether all arguments of a call are accepted as they are."""
    sure = _sure_values(function)
    for name, value in named.items():
        if name not in sure:
            return False
        if sure[name].has(value):  # most arguments
            continue
        expected = _hints_of(function).get(name, Any)
        if _plain(value, expected) is not value or not _accepts(value, expected):
            return False
    return True


class _Sure(typing.NamedTuple):
    """Values of an argument that are surely accepted, as they are, and quickly known."""

    types: frozenset[type]
    """of the values"""
    has_mappings: bool
    """so are lists of dicts with texts as keys"""
    is_any: bool
    """so is every value that is no path, sequence or number"""

    def has(self, value: Any) -> bool:
        kind = type(value)
        if kind in self.types:
            return True
        if self.has_mappings and kind is list and _DICT.issuperset(map(type, value)):
            return _TEXT.issuperset(map(type, chain.from_iterable(value)))
        return self.is_any and not _may_change(kind)  # type: ignore[arg-type]  # mypy: no Hashable


_DICT = frozenset([dict])
_TEXT = frozenset([str])


@functools.lru_cache(maxsize=64)
def _may_change(kind: type) -> bool:
    """Return whether `_plain` may make something else of a value of this type."""
    return issubclass(kind, (os.PathLike, Sequence, Integral))


@functools.cache
def _sure_values(function: Callable[..., Any]) -> Mapping[str, _Sure]:
    """Return for each argument what is surely accepted."""
    hints = _hints_of(function)
    sure = {}
    for name in inspect.signature(function).parameters:
        expected = hints.get(name, Any)
        members = typing.get_args(expected) or (expected,)
        is_union = typing.get_origin(expected) in (typing.Union, types.UnionType)
        plain = members if is_union else (expected,)
        sure[name] = _Sure(
            types=frozenset(kind for kind in plain if kind in _PLAIN),
            has_mappings=Sequence[Mapping[str, Any]] in plain,
            is_any=expected is Any,
        )
    return sure


def _plain(value: Any, expected: Any) -> Any:
    """Return a path as its text and a number of numpy as Python's; any other value as it is."""
    if isinstance(value, os.PathLike) and _accepts("", expected):
        return os.fspath(value)
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)
    if is_list and _accepts([""], expected):
        return [os.fspath(item) if isinstance(item, os.PathLike) else item for item in value]
    if isinstance(value, Integral) and not isinstance(value, int):
        return int(value)
    return value


def _accepts(value: Any, expected: Any) -> bool:
    """Return whether a value is of a type; True for a type that is not looked at."""
    origin = typing.get_origin(expected)
    inner = typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(value, member) for member in inner)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if origin is Sequence:
        # numpy's arrays and pandas' columns are no Sequence, but serve as one.
        is_sequence = hasattr(value, "__len__") and hasattr(value, "__getitem__")
        is_other = isinstance(value, str | bytes | Mapping)
        return is_sequence and not is_other and all(_accepts(item, inner[0]) for item in value)
    if expected in _PLAIN:
        is_switch = isinstance(value, bool) and expected in (int, float)
        return isinstance(value, _PLAIN[expected].accepted) and not is_switch
    return True


class _Plain(typing.NamedTuple):
    """A type that arguments have."""

    accepted: tuple[type, ...]
    words: str
    plural: str


_PLAIN = {
    str: _Plain((str,), "a text", "texts"),
    int: _Plain((Integral,), "a whole number", "whole numbers"),
    float: _Plain((Real,), "a number", "numbers"),
    bool: _Plain((Integral,), "True or False", "switches"),
    type(None): _Plain((type(None),), "None", "None"),
}


def _words(expected: Any) -> Iterator[str]:
    """Yield what a type, or each member of a union, is called."""
    origin = typing.get_origin(expected)
    inner = typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        for member in inner:
            yield from _words(member)
    elif origin is Mapping:
        yield "a mapping from texts"
    elif origin is Sequence:
        (item,) = inner
        if typing.get_origin(item) is Mapping:
            yield "a sequence of mappings"
            return
        yield f"a sequence of {_PLAIN[item].plural}" if item in _PLAIN else "a sequence"
    else:
        yield _PLAIN[expected].words if expected in _PLAIN else str(expected)
