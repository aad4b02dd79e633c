"""What `import miles.data` gives."""

from __future__ import annotations

import subprocess
import sys


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_functions_stay_functions_whatever_was_imported_before() -> None:
    printed = python(
        "import miles.data.encoding.encoder, miles.data.stream.stages\n"
        "import miles.data.notebook.dataset\n"
        "from miles.data import encode, prepare\n"
        "print(callable(encode), callable(prepare), callable(miles.data.encode), callable(miles.data.prepare))"
    )
    assert printed == "True True True True"


def test_importing_the_package_is_cheap() -> None:
    printed = python(
        "import sys, miles.data\nprint([m for m in ('ray', 'torch', 'transformers') if m in sys.modules])"
    )
    assert printed == "[]"
