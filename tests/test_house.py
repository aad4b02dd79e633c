"""The rules of the house that no other tool checks."""

from __future__ import annotations

import subprocess
import sys

IMPORTED_EARLY = (
    "miles.architecture",
    "miles.data.config",
    "miles.train.config",
    "miles.train.driver",
    "miles.train.launch",
    "miles.train.parallel_layout",
    "miles.train.types",
)
"""Modules, and packages with all that is in them."""

_IMPORT_ALL = """
import importlib, pkgutil, sys

for name in sys.argv[1:]:
    room = importlib.import_module(name)
    path = getattr(room, "__path__", [])  # a package has one
    inside = [module.name for module in pkgutil.walk_packages(path, name + ".")]
    for module in [name, *inside]:
        importlib.import_module(module)
        for heavy in ("torch", "megatron"):
            if heavy in sys.modules:
                sys.exit(f"importing {module} imports {heavy}")
"""


def test_settings_and_driver_import_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL, *IMPORTED_EARLY], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
