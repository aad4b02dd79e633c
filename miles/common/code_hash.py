"""The hash of a function's code: the same for the same code, wherever it stands and is run.

    def clean(row): return {"text": row["a"] + SUFFIX}      SUFFIX = "."

Covered are the compiled code (names, constants and nested functions in it), default values, values
that it closes over, and what it names in its own module: functions and classes of that module in the
same way, and plain values (text, numbers, tuples, lists, dicts, sets, patterns, enums). What is
imported counts by its name alone, but for a function of the user's own that another one closes over,
such as one below a decorator. Comments, line numbers, the function's name and its file count for
nothing. Another minor version of Python compiles to other code, and so has another hash.

A value of another kind, such as an open file or a model, has no hash that is the same tomorrow: it is
refused.
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import hashlib
import inspect
import json
import logging
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_HASH_DIGITS = 32
_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_ATOMS = (str, int, float, complex, bool, bytes, type(None), type(Ellipsis))


class NoHashError(Exception):
    """Code depends on a value whose content has no lasting hash. The text says which."""


def code_hash(function: Callable[..., Any]) -> str:
    """Return 32 hex digits over the code of a function.

    Raises:
        NoHashError: it depends on a value of a kind that is not covered.
    """
    plain = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    try:
        described = _Description(getattr(plain, "__module__", "")).of(function, "the function")
        text = json.dumps(described, sort_keys=True)
    except RecursionError:
        raise NoHashError(
            "it depends on a value that is nested too deeply, or contains itself"
        ) from None
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_DIGITS]


class _Description:
    """Describes code and values as JSON that is the same for the same code."""

    def __init__(self, module: str) -> None:
        self._modules = {module}
        """whose functions and classes count by their code"""
        self._seen: dict[int, int] = {}
        """id of a function or class -> its number, in the order in which they are met"""
        self._kept: list[Any] = []
        """what has been met: no other object can get its id"""

    def of(self, value: Any, where: str) -> Any:
        """Return a value as JSON.

        Args:
            where: names it in errors.
        """
        if isinstance(value, enum.Enum):
            return ["enum", type(value).__qualname__, value.name, self.of(value.value, where)]
        if isinstance(value, _ATOMS):
            return [type(value).__name__, repr(value)]
        if isinstance(value, tuple | list):
            return [type(value).__name__, [self.of(item, where) for item in value]]
        if isinstance(value, set | frozenset):
            items = [json.dumps(self.of(item, where), sort_keys=True) for item in value]
            return ["set", sorted(items)]
        if isinstance(value, Mapping):
            pairs = [[self.of(key, where), self.of(item, where)] for key, item in value.items()]
            return [type(value).__name__, pairs]
        if isinstance(value, re.Pattern):
            return ["pattern", self.of(value.pattern, where), value.flags]
        return self._of_code(value, where)

    def _of_code(self, value: Any, where: str) -> Any:
        if isinstance(value, types.CodeType):
            return self._code(value, where)
        if isinstance(value, functools.partial):
            parts = (value.func, *value.args, *value.keywords.values())
            names = [len(value.args), *value.keywords]
            return ["partial", names, [self._of_held(part, where) for part in parts]]
        if isinstance(value, functools._lru_cache_wrapper) and self._is_own(value):
            return ["cached", self.of(value.__wrapped__, where)]
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        if isinstance(value, staticmethod | classmethod):
            return [type(value).__name__, self.of(value.__func__, where)]
        if isinstance(value, property):
            return ["property", [self.of(part, where) for part in (value.fget, value.fset)]]
        if isinstance(value, types.FunctionType | type) and self._is_own(value):
            return self._once(value, where)
        if isinstance(value, types.MethodType):
            return ["method", self.of(value.__self__, where), self.of(value.__func__, where)]
        if callable(value) and hasattr(value, "__qualname__"):
            return ["name", _qualified(value)]
        if isinstance(value, logging.Logger):
            return ["logger", value.name]
        if self._is_own(type(value)) and hasattr(value, "__dict__"):
            return ["object", self.of(type(value), where), self.of(vars(value), where)]
        raise NoHashError(
            f"{where} is of type {_qualified(type(value))}, whose content cannot be told apart from "
            "another one's by a hash; make it inside the function, or pass plain values"
        )

    def _is_own(self, value: Any) -> bool:
        return value.__module__ in self._modules

    def _of_held(self, value: Any, where: str) -> Any:
        """Return a value that code holds on to: closes over, has as a default, or calls by a partial.

        A function of the user's is one that no import names, so it counts by its code.
        """
        module = getattr(value, "__module__", None)
        if callable(value) and isinstance(module, str) and not _is_installed(module):
            self._modules.add(module)
        return self.of(value, where)

    def _once(self, value: Any, where: str) -> Any:
        """Return a function or class of the module; where it was described before, its number."""
        if id(value) in self._seen:
            return ["again", self._seen[id(value)]]
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        return self._class(value) if isinstance(value, type) else self._function(value, where)

    def _function(self, function: types.FunctionType, where: str) -> Any:
        closure = []
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            with_name = f"{name}, which {where} closes over,"
            is_set = cell != types.CellType()
            closure.append(self._of_held(cell.cell_contents, with_name) if is_set else "empty")

        used = {}
        for name in sorted(_globals_of(function.__code__)):
            if name in function.__globals__:
                used[name] = self.of(function.__globals__[name], f"{name}, which {where} uses,")
        return {
            "code": self._code(function.__code__, where),
            "defaults": self.of(function.__defaults__, f"a default value of {where}"),
            "keyword_defaults": self.of(function.__kwdefaults__, f"a default value of {where}"),
            "closure": closure,
            "globals": used,
        }

    def _class(self, kind: type) -> Any:
        """Return the functions and plain values of a class. What Python adds to it says no more."""
        where = f"class {kind.__qualname__}"
        if issubclass(kind, enum.Enum):
            members: dict[str, Any] = {member.name: member.value for member in kind}
        else:
            members = dict(vars(kind))

        described = {}
        for name, member in sorted(members.items()):
            if isinstance(member, types.FunctionType):
                # Those of a dataclass follow from its fields.
                is_written = member.__code__.co_filename != "<string>"
            else:
                is_code = isinstance(member, staticmethod | classmethod | property)
                is_written = is_code or not name.startswith("__")
            if (is_written and not inspect.isdatadescriptor(member)) or isinstance(
                member, property
            ):
                described[name] = self.of(member, f"{name} of {where}")
        bases = [self.of(base, f"a base of {where}") for base in kind.__bases__]
        return {"class": described, "bases": bases, "fields": self._fields(kind, where)}

    def _fields(self, kind: type, where: str) -> list[Any]:
        """Return the fields of a dataclass, in order, with what makes their default values."""
        if not dataclasses.is_dataclass(kind):
            return []
        made = []
        for field in dataclasses.fields(kind):
            has_maker = field.default_factory is not dataclasses.MISSING
            maker = field.default_factory if has_maker else None
            made.append([field.name, self.of(maker, f"{field.name} of {where}")])
        return made

    def _code(self, code: types.CodeType, where: str) -> Any:
        return [
            code.co_code.hex(),
            getattr(code, "co_exceptiontable", b"").hex(),
            [self.of(constant, f"a constant of {where}") for constant in code.co_consts],
            [code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars],
            [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount],
            code.co_flags & ~inspect.CO_NESTED,  # where it stands
        ]


@functools.cache
def _is_installed(module: str) -> bool:
    """Return whether a module is Python's, or lies where packages are installed."""
    if module.split(".")[0] in sys.stdlib_module_names and module != "__main__":
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:  # a notebook's cells
        return False
    paths = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    return any(Path(file).is_relative_to(path) for path in paths if path)


def _globals_of(code: types.CodeType) -> set[str]:
    """Return the names that code, and functions within it, look up in their module."""
    names = {str(step.argval) for step in dis.get_instructions(code) if step.opname in _LOADS}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _globals_of(constant)
    return names


def _qualified(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{value.__qualname__}"
