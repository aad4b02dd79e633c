"""miles: supervised fine-tuning as data -> loss -> optimizer.

    miles.data.prepare(…)    a data set to look at, to write, or to train on
    miles.train.run(…)       a run, from a notebook or a script
    miles.report.write_report(…)

The rooms are imported when they are first named: `import miles` alone takes milliseconds.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__version__ = "0.1.0"

__all__ = ["data", "report", "train"]


def __getattr__(name: str) -> ModuleType:
    """Import a room when it is first used."""
    # By its text: an import statement here would be an arrow from every file that reads
    # `__version__` to every room (import contracts).
    if name in __all__:
        return importlib.import_module(f"miles.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return what tab completion shows: the rooms for users."""
    return __all__
