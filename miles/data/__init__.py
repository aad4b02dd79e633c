"""The data path: rows -> conversations -> tokens and masks -> packed steps. See README.md in this folder.

`miles.data.prepare` and `miles.data.encode` are functions, imported with what they need when they are first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles.data.encode import encode
    from miles.data.prepare import prepare

__all__ = ["encode", "prepare"]


class _Package(ModuleType):
    """Keeps the import system from putting the modules `encode` and `prepare` in place of their functions.

    It does so whenever anybody first imports such a file, so that the same expression would be a function or a module
    depending on what ran before.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in __all__:
            return getattr(importlib.import_module(f"{__name__}.{name}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


sys.modules[__name__].__class__ = _Package
