"""The package `miles.data`: its two functions, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys


def python(code: str) -> str:
    """Run Python code in a process of its own; return what it prints."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_functions_stay_functions() -> None:
    printed = python(
        "import miles.data.encoding.encoder, miles.data.stream.stages\n"
        "import miles.data.notebook.prepare\n"
        "from miles.data import encode, prepare\n"
        "functions = encode, prepare, miles.data.encode, miles.data.prepare\n"
        "print(*map(callable, functions))"
    )
    assert printed == "True True True True"


def test_importing_the_package_is_cheap() -> None:
    printed = python(
        "import sys, miles.data\n"
        "print([name for name in ('ray', 'torch', 'transformers') if name in sys.modules])"
    )
    assert printed == "[]"
