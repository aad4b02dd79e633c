"""The user's function that makes a row of any form one that is read: its name, its code's hash.

    --transform my_rows:to_messages          imported, here and in each loader
    prepare(…, transform=to_messages)        given; carried to the loaders by Ray, a cell's by value

Settings, manifests and checkpoints hold the name and the hash alone, as text. So no function is ever
unpickled from a folder: the code is what this process, or a module on this machine, has. A loader
that imports other code than the driver did refuses it.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from miles.common.code_hash import NoHashError, code_hash
from miles.common.near_names import did_you_mean
from miles.common.shown import cut, shown
from miles.errors import ConfigError

Function = Callable[[dict[str, Any]], Any]
"""A row -> a row, a list of messages, or None."""

FLAG = "--transform"
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_FORM = f"{FLAG} takes package.module:function, such as my_rows:to_messages"


class Transform:
    """A function that makes rows, by its name and its code's hash.

    No record: the settings of a run show it as text (`str`), not by its fields. Two are equal where
    their code is.
    """

    def __init__(self, name: str, code: str, function: Function | None, folder: str = "") -> None:
        self.name = name
        """`package.module:function`"""
        self.code = code
        """`code_hash` of the function"""
        self._function = function
        self._folder = folder
        """where the module was looked for beside the environment; "": nowhere"""

    @classmethod
    def of(cls, value: Any) -> Transform:
        """Return the transform that a name or a function means.

        Raises:
            ConfigError: no such module or function, a module that cannot be imported, or code that
                has no hash.
        """
        if isinstance(value, Transform):
            return value
        if isinstance(value, str):
            folder = os.getcwd()
            function = _imported(value, folder)
            return cls(value, _hash_of(function, value), function, folder)

        name = _name_of(value)
        if not callable(value) or isinstance(value, type):
            raise ConfigError(
                f"transform must be a function or the name of one, not {shown(value)} "
                f"({type(value).__name__}). {_FORM}"
            )
        return cls(name, _hash_of(value, name), value)

    @classmethod
    def from_json(cls, content: Mapping[str, str]) -> Transform:
        """Return what `to_json` wrote. Its function is imported where it is called, not before."""
        return cls(content["name"], content["code"], None)

    def to_json(self) -> dict[str, str]:
        """Return what is kept of it: its name and its code's hash."""
        return {"name": self.name, "code": self.code}

    @property
    def function(self) -> Function:
        """The function; imported, where this process does not have it yet.

        Raises:
            ConfigError: it cannot be imported, or its code is another.
        """
        if self._function is None:
            self._function = self._import()
        return self._function

    def _import(self) -> Function:
        function = _imported(self.name, self._folder)
        if _hash_of(function, self.name) != self.code:
            # A process that outlives a change of the file has the code from before it.
            importlib.reload(sys.modules[self.name.partition(":")[0]])
            function = _imported(self.name, self._folder)
        if _hash_of(function, self.name) != self.code:
            file = getattr(sys.modules[self.name.partition(":")[0]], "__file__", None)
            raise ConfigError(
                f"{FLAG} {self.name}: its code in {file} is not that with which the rows were "
                "counted. Have the same file on each machine, and start anew"
            )
        return function

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel by name where the function can be imported, else with the function."""
        function = self._function
        is_importable = function is None or _is_importable(self.name, function)
        return Transform, (self.name, self.code, None if is_importable else function, self._folder)

    def __deepcopy__(self, memo: Any) -> Transform:
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Transform) and self.code == other.code

    def __hash__(self) -> int:
        return hash(self.code)

    def __str__(self) -> str:
        return f"{self.name} (code {self.code})"

    __repr__ = __str__


def _name_of(function: Any) -> str:
    if isinstance(function, functools.partial):
        return _name_of(function.func)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '')}:{name}"


def _is_importable(name: str, function: Function) -> bool:
    """Return whether another process finds a function by its name."""
    module, _, path = name.partition(":")
    if module == "__main__" or module not in sys.modules or not _NAME.fullmatch(name):
        return False
    found: Any = sys.modules[module]
    for part in path.split("."):
        found = getattr(found, part, None)
    return found is function


def _imported(name: str, folder: str) -> Function:
    """Import a function.

    Args:
        name: `package.module:function`
        folder: a module that the environment does not have is looked for there.
    """
    if not _NAME.fullmatch(name) or ".py:" in name:
        hint = ""
        if ".py:" in name:
            module, _, path = name.removeprefix("./").partition(".py:")
            hint = f". A module has no .py, and dots for slashes: {module.replace('/', '.')}:{path}"
        raise ConfigError(f"{FLAG} {shown(name)}: {_FORM}{hint}")
    module_name, _, path = name.partition(":")
    if folder and folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
        importlib.invalidate_caches()

    found: Any = _module(name, module_name, folder)
    for part in path.split("."):
        if not hasattr(found, part):
            hint = did_you_mean(part, dir(found))
            raise ConfigError(f"{FLAG} {name}: {module_name} has no {part}{hint}")
        found = getattr(found, part)
    if not callable(found) or isinstance(found, type):
        raise ConfigError(f"{FLAG} {name}: {shown(found)} is no function. {_FORM}")
    function: Function = found
    return function


def _module(name: str, module_name: str, folder: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{FLAG} {name}: {module_name} imports {error.name}, which is not installed"
            ) from error
        raise ConfigError(
            f"{FLAG} {name}: there is no module {error.name}, neither in the environment nor in "
            f"{folder}. Start from the folder that holds it, or set PYTHONPATH"
        ) from error
    # Whatever the user's module raises, when it is run for the first time.
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        # The text of a syntax error has its line.
        has_place = isinstance(error, SyntaxError)
        place = "" if has_place else f" (line {last.lineno} of {last.filename})"
        raise ConfigError(
            f"{FLAG} {name}: {module_name} cannot be imported: {type(error).__name__}: "
            f"{cut(str(error), 200)}{place}"
        ) from error


def _hash_of(function: Function, name: str) -> str:
    try:
        return code_hash(function)
    except NoHashError as error:
        raise ConfigError(f"{FLAG} {name}: {error}") from None
