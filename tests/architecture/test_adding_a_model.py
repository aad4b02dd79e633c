"""The page that says how to add a family is followed, to the letter."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import miles.architecture.families
from miles.architecture.families import model_types
from miles.convert.hf_to_megatron import hf_to_megatron
from miles.convert.megatron_to_hf import megatron_to_hf
from miles.convert.verify import verify
from miles.errors import CheckpointError
from tests.support.models import edit_config, make_hf, require_same_files

PAGE = Path(__file__).parents[2] / "docs/adding-a-model.md"


def test_mistral_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_hf(tmp_path / "hf", "mistral", tied=False)
    edit_config(source, sliding_window=None)
    with pytest.raises(CheckpointError, match="model_type 'mistral' is not one of"):
        hf_to_megatron(str(source), str(tmp_path / "megatron"))

    (code,) = re.findall(r'```python\n(""".*?)```', PAGE.read_text(), re.DOTALL)
    (tmp_path / "families").mkdir()
    (tmp_path / "families/mistral.py").write_text(code)
    monkeypatch.setattr(
        miles.architecture.families,
        "__path__",
        [*miles.architecture.families.__path__, str(tmp_path / "families")],
    )
    monkeypatch.delitem(sys.modules, "miles.architecture.families.mistral", raising=False)

    assert "mistral" in model_types()
    hf_to_megatron(str(source), str(tmp_path / "megatron"))
    assert not verify(str(source), str(tmp_path / "megatron")).differences
    megatron_to_hf(str(tmp_path / "megatron"), str(source), str(tmp_path / "back"))
    require_same_files(source, tmp_path / "back")
    edit_config(source, sliding_window=4096)
    with pytest.raises(CheckpointError, match="sliding_window = 4096, only None is supported"):
        hf_to_megatron(str(source), str(tmp_path / "megatron"))
