"""The package `miles.data`: its two functions, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from miles.data.config import EncodeConfig
from miles.data.encoding import kept_encoders, state_cache


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


def test_a_card_of_a_certified_tokenizer_is_cheap(
    chatml_tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow imports pandas for the first array that is made of a list."""
    monkeypatch.setenv("MILES_CACHE", str(tmp_path))
    config = kept_encoders.first_engine(EncodeConfig(str(chatml_tokenizer_folder)))
    key, state = state_cache.key_of(config), kept_encoders.state_of(config)
    assert key is not None
    assert state is not None
    state_cache.keep(key, config, state)

    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    printed = python(
        "import sys, miles.data\n"
        f"rows = [{{'messages': {messages}}}] * 300\n"
        f"data = miles.data.prepare('sums', source=rows, tokenizer={config.tokenizer!r})\n"
        "assert '300' in data._repr_html_()\n"
        "heavy = ('ray', 'torch', 'transformers', 'pandas')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert printed == "[]"
