"""Hugging Face -> Megatron -> Hugging Face: nothing lost, the same logits, mistakes named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from miles.architecture import ModelShape
from miles.convert.hf_to_megatron import hf_to_megatron
from miles.convert.megatron_to_hf import megatron_to_hf
from miles.errors import CheckpointError
from miles.train.topology import Layout
from tests.models import make_hf
from tests.train.ranks import SETTINGS, run_ranks, start

FAMILIES = [
    ("qwen3", True),
    ("qwen3", False),
    ("qwen2", True),
    ("qwen2", False),
    ("llama", True),
    ("llama", False),
    ("qwen3_moe", False),
]
"""Model type, and whether the output layer is the embedding."""


@pytest.mark.parametrize(
    ("model_type", "tied", "dtype"),
    [*((*family, torch.float32) for family in FAMILIES), ("qwen3", False, torch.bfloat16)],
)
def test_there_and_back_every_tensor_is_bit_identical(
    tmp_path: Path, model_type: str, tied: bool, dtype: torch.dtype
) -> None:
    source = make_hf(tmp_path / "hf", model_type, tied=tied, dtype=dtype)
    hf_to_megatron(str(source), str(tmp_path / "megatron"))
    assert (tmp_path / "megatron/latest_checkpointed_iteration.txt").read_text() == "release"
    megatron_to_hf(str(tmp_path / "megatron"), str(source), str(tmp_path / "back"))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype == dtype
        assert torch.equal(before[name], after[name]), name
    assert {file.name for file in source.iterdir()} == {file.name for file in (tmp_path / "back").iterdir()}


def megatron_logits(
    layout: Layout, rank: int, meeting: Path, models: list[tuple[str, str]], ids: list[int]
) -> list[np.ndarray]:
    """The converted checkpoints in real GPTModels, one after the other."""
    from megatron.core.dist_checkpointing import load_tensors_metadata

    from miles.train import checkpoint
    from miles.train.step import Trainer

    start(layout, rank, meeting)
    logits = []
    for hf, load in models:
        trainer = Trainer(ModelShape.from_hf_folder(hf), layout, rank, SETTINGS, 10, 1, bf16=False)
        stored = set()
        for value in trainer.gpt.sharded_state_dict().values():
            stored |= {getattr(part, "key", "") for part in (value.build() if hasattr(value, "build") else [value])}
        found = checkpoint.find(load)
        assert found is not None
        assert set(load_tensors_metadata(found.url)) == {key for key in stored if not key.endswith("_extra_state")}
        checkpoint.load(trainer, found, model_only=True)
        logits.append(trainer.logits(ids))
    return logits


@pytest.mark.slow
def test_megatron_and_transformers_give_the_same_logits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = np.random.default_rng(1).integers(0, 192, 200).tolist()
    models, expected = [], []
    for model_type, tied in FAMILIES:
        source = make_hf(tmp_path / f"hf-{model_type}-{tied}", model_type, tied=tied)
        hf_to_megatron(str(source), str(tmp_path / f"megatron-{model_type}-{tied}"))
        models.append((str(source), str(tmp_path / f"megatron-{model_type}-{tied}")))
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
            expected.append(model(torch.tensor([ids])).logits[0].numpy())
    (got,) = run_ranks(megatron_logits, Layout(1), models, ids)
    for family, one, other in zip(FAMILIES, got, expected, strict=True):
        assert np.abs(other).max() > 0.1, family
        assert np.abs(one - other).max() < 1e-4, family


def edit_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight is missing"),
        (lambda t: t.update({"model.odd": torch.ones(1)}), r"does not ask for tensor model\.odd"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"model\.norm\.weight has shape \(7,\)"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_a_wrong_tensor_is_named_and_nothing_looks_complete(tmp_path: Path, change: Any, message: str) -> None:
    source = make_hf(tmp_path / "hf", "qwen3", tied=True)
    edit_tensors(source, change)
    with pytest.raises(CheckpointError, match=message):
        hf_to_megatron(str(source), str(tmp_path / "megatron"))
    assert not (tmp_path / "megatron/latest_checkpointed_iteration.txt").exists()


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf", "qwen3_moe", tied=False)
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    edit_tensors(source, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
        hf_to_megatron(str(source), str(tmp_path / "megatron"))


def test_bad_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf", "qwen3", tied=True)
    with pytest.raises(CheckpointError, match=r"nowhere/config\.json: no such file"):
        hf_to_megatron(str(tmp_path / "nowhere"), str(tmp_path / "megatron"))
    with pytest.raises(CheckpointError, match=r"latest_checkpointed_iteration\.txt is missing"):
        megatron_to_hf(str(tmp_path / "hf"), str(source), str(tmp_path / "back"))

    hf_to_megatron(str(source), str(tmp_path / "megatron"))
    other = shutil.copytree(source, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="num_layers is 4 in the checkpoint, 3 in the configuration"):
        megatron_to_hf(str(tmp_path / "megatron"), str(other), str(tmp_path / "back"))
    assert not (tmp_path / "back").exists()

    (other / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(CheckpointError, match="model_type 'mamba'"):
        hf_to_megatron(str(other), str(tmp_path / "m2"))

    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        CheckpointError,
        match=r"model\.safetensors: truncated: tensor model\.layers\.1\.self_attn\.o_proj\.weight ends at",
    ):
        hf_to_megatron(str(source), str(tmp_path / "m3"))
