"""transformers is imported without torch where that is asked for, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from miles.common import spared_torch
from miles.common.spared_torch import importing_transformers

PROGRAM = """
import sys
from miles.cli import main
sys.argv = ["miles", "certify", sys.argv[1]]
assert main() == 0
loaded = "transformers" in sys.modules, "torch" in sys.modules
import importlib.util
print(loaded, importlib.util.find_spec("torch") is not None)
"""


def test_a_command_without_models_imports_no_torch(
    chatml_tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILES_CACHE", "")
    words = [sys.executable, "-c", PROGRAM, str(chatml_tokenizer_folder)]
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1:] == ["(True, False) True"], run.stderr
    assert "PyTorch" not in run.stderr


@pytest.mark.parametrize("reason", ["models", "code", "torch", "transformers"])
def test_a_process_that_may_need_torch_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    for name in ("torch", "transformers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if reason in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, reason, sys)
    monkeypatch.setattr(spared_torch._process, "needs_models", reason == "models")
    before = dict(sys.modules)
    with importing_transformers(may_need_torch=reason == "code"):
        assert sys.modules == before


def test_torch_can_be_imported_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "transformers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(spared_torch._process, "needs_models", False)
    with pytest.raises(ModuleNotFoundError), importing_transformers(may_need_torch=False):
        import torch  # noqa: F401
    assert "torch" not in sys.modules
