"""Two adapters compared, of either format: the tensors that differ, by name, and the scale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from miles.architecture.adapter import PEFT_PREFIX, AdapterShape
from miles.cli import main
from miles.convert.megatron_to_hf import megatron_to_hf
from miles.convert.safetensors_headers import ADAPTER
from miles.convert.verify import verify
from miles.errors import CheckpointError
from tests.support.adapters import save_as_run
from tests.support.models import make_hf

B2 = f"{PEFT_PREFIX}model.layers.2.mlp.up_proj.lora_B.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, an adapter in both formats, and another one: a weight and the scale differ."""
    make_hf(tmp_path / "hf", "qwen3", tied=True)
    adapter = AdapterShape(4, 8.0, ("q_proj", "up_proj"))
    save_as_run(tmp_path / "hf", tmp_path / "run", adapter)
    megatron_to_hf(str(tmp_path / "run"), str(tmp_path / "hf"), str(tmp_path / "peft"))

    shutil.copytree(tmp_path / "peft", tmp_path / "other")
    tensors = load_file(tmp_path / "other" / ADAPTER)
    tensors[B2][5, 1] += 0.5
    save_file(tensors, tmp_path / "other" / ADAPTER)
    config = json.loads((tmp_path / "other/adapter_config.json").read_text())
    (tmp_path / "other/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    return tmp_path


def test_of_either_format(folder: Path) -> None:
    pairs = [("run", "peft"), ("peft", "run"), ("run", "run"), ("peft", "peft")]
    for first, second in pairs:
        same = verify(str(folder / first), str(folder / second))
        assert same.differences == ()
        assert same.num_tensors == 2 * 2 * 4

    for first in ("run", "peft"):
        comparison = verify(str(folder / first), str(folder / "other"))
        found = {difference.tensor: difference.text for difference in comparison.differences}
        assert found == {
            B2: "1 of 512 values differ, by 0.5 at most",
            "scale of all": "2 and 4",
        }


def test_another_set_of_tensors(folder: Path) -> None:
    tensors = load_file(folder / "other" / ADAPTER)
    tensors.pop(B2)
    save_file(tensors, folder / "other" / ADAPTER)
    assert main(["convert", "verify", str(folder / "run"), str(folder / "other")]) == 1
    (missing, scale) = verify(str(folder / "run"), str(folder / "other")).differences
    assert (missing.tensor, missing.text) == (B2, f"only in {folder}/run/iter_0000007")
    assert scale.tensor == "scale of all"


def test_an_adapter_is_not_compared_with_a_model(folder: Path) -> None:
    for name in ("run", "peft"):
        for pair in (("hf", name), (name, "hf")):
            with pytest.raises(CheckpointError, match=f"{name}: an adapter, which cannot be comp"):
                verify(*(str(folder / part) for part in pair))
