"""Python's values as JSON in UTF-8; where one has no place in it, and what to write instead.

{"a": (1, "é")}                     ->  {"a": [1, "é"]}
{"a": [0, {"b": numpy.int64(3)}]}   ->  "a[1].b", "a value of type numpy.int64, which JSON …"
{"a": float("nan")}                 ->  "a", "nan, which JSON has no number for …"
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_KNOWN = (str, int, float, bool, type(None))
_REMEDIES = {
    "numpy": "take value.item(), or value.tolist() of an array",
    "datetime": "take value.isoformat()",
    "builtins.bytes": "take value.decode()",
    "builtins.set": "take sorted(value)",
    "decimal": "take float(value), or str(value)",
    "pandas": "take str(value)",
    "PIL": "leave the column out: pictures are not trained on",
}
"""Module, or module and type, of a value -> what to write in its place."""
_DEEPEST = 200
"""A value nested deeper is taken for one that contains itself."""
_MOST_OF_A_PLACE = 120


class Fault(NamedTuple):
    """A value that JSON does not have."""

    place: str
    """its keys, as people write them: `messages[1].content`; "" for a row's own"""
    cause: str

    def __str__(self) -> str:
        return f"{self.place}: {self.cause}" if self.place else self.cause


class NoJsonError(Exception):
    """A value holds another one that JSON does not have."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


def as_json(value: Any) -> bytes:
    """Return a value as JSON, in UTF-8, as far as that can write its text.

    Raises:
        NoJsonError: it has no place in JSON, or contains itself.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair: JSON can write it, UTF-8 cannot
        return json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise NoJsonError(_first_fault(value) or Fault("", str(error))) from None


def _first_fault(value: Any) -> Fault | None:
    """Return the first value in a value that JSON does not have; None where it has all."""
    return next(_faults(value, ()), None)


def _faults(value: Any, path: tuple[Any, ...]) -> Iterator[Fault]:
    if len(path) > _DEEPEST:
        yield Fault(_place(path[:3]), "it is nested too deeply, or contains itself")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, _KNOWN):
                yield Fault(_place(path), f"a key of type {_name(key)}; a key must be text")
            yield from _faults(inner, (*path, key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _faults(inner, (*path, index))
    elif isinstance(value, float) and not math.isfinite(value):
        cause = f"{value}, which JSON has no number for. Write None for a missing value"
        yield Fault(_place(path), cause)
    elif not isinstance(value, _KNOWN):
        cause = f"a value of type {_name(value)}, which JSON has no place for{_remedy(value)}"
        yield Fault(_place(path), cause)


def _name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else _full_name(kind)


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _remedy(value: Any) -> str:
    kind = type(value)
    remedy = _REMEDIES.get(_full_name(kind)) or _REMEDIES.get(kind.__module__.split(".")[0])
    return f". In its place {remedy}" if remedy else ""


def _place(path: tuple[Any, ...]) -> str:
    text = ""
    for part in path:
        is_index = isinstance(part, int) and not isinstance(part, bool)
        text += f"[{part}]" if is_index else f".{part}"
    text = text.removeprefix(".").replace("\n", "↵")
    return text if len(text) <= _MOST_OF_A_PLACE else f"{text[:_MOST_OF_A_PLACE]}…"
