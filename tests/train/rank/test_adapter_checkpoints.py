"""Checkpoints of a run that trains an adapter: only that is in them, and all of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles.architecture.adapter import TARGETS, AdapterShape, adapter_parameters
from miles.architecture.families import read_shape
from miles.common.adapter_base import find_base
from miles.common.checkpoint_folder import EXTRA, SavedCheckpoint, find
from miles.convert.merge_adapter import Targets, merge_adapter
from miles.convert.peft_adapter import AdapterPlan
from miles.errors import CheckpointError
from miles.train.model.dtypes import DTYPES
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.types import AdapterSettings, StartPoint
from tests.support import plain_megatron
from tests.support.adapters import save_with_peft
from tests.support.fault_table import NOTHING, observed
from tests.support.models import edit_tensors, make_hf
from tests.support.ranks import SHAPE, batch, run_ranks, start, trainer_settings

ONE = Layout(1)
LAYOUTS = {
    "TP 2, sequence parallel": Layout(2, 2, 1, True),
    "PP 2": Layout(2, 1, 2),
    "DP 2": Layout(2),
}
LORA = AdapterSettings(AdapterShape(4, 8.0, TARGETS), dropout=0.1, seed=3)
PEFT = AdapterShape(4, 6.0, ("q_proj", "v_proj", "down_proj"))
PROMPT = [1, 2, 3, 250, 7]


@pytest.fixture(scope="module", autouse=True)
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from miles.train.model import process_groups

    start(ONE, 0, tmp_path_factory.mktemp("ranks") / "meeting")
    yield
    process_groups.shutdown()


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "hf"
    return make_hf(folder, "qwen3", tied=True, vocab_size=SHAPE.vocab_size)


class Saved:
    """A run of adapters: three steps, a checkpoint, and two steps that follow."""

    def __init__(self, hf: Path, folder: Path) -> None:
        self.url = str(folder)
        trainer, base = begin(new_start(hf), hf)
        train(trainer, range(3))
        save(trainer, folder, base)
        self.losses = train(trainer, range(3, 5))
        self.adapter = adapter_of(trainer)

    def start(self, hf: Path) -> StartPoint:
        """Return the start that goes on from it, with the base in a folder."""
        checkpoint = find(self.url)
        assert checkpoint is not None
        return StartPoint(checkpoint, True, find_base(checkpoint, None, None, str(hf)))


@pytest.fixture(scope="module")
def saved(hf: Path) -> Saved:
    return Saved(hf, hf.parent / "run")


def new_start(hf: Path, adapter_path: Path | None = None) -> StartPoint:
    weights = SavedCheckpoint(str(hf), 0, None, is_hugging_face=True)
    return StartPoint(weights, False, adapter_path=adapter_path and str(adapter_path))


def begin(
    start: StartPoint,
    hf: Path,
    lora: AdapterSettings | None = LORA,
    *,
    layout: Layout = ONE,
    rank: int = 0,
    precision: Precision = Precision.FP32,
) -> tuple[Any, Any]:
    """Return a trainer that has loaded a start, and its frozen weights."""
    from miles.train.rank import checkpoint_load
    from miles.train.rank.trainer import Trainer

    shape = read_shape(str(hf))
    settings = trainer_settings(shape, layout, precision=precision, lora=lora)
    trainer = Trainer(settings, rank)
    return trainer, checkpoint_load.load_start(trainer, start)


def save(trainer: Any, folder: Path, base: Any, iteration: int = 3) -> Path:
    from miles.train.rank import checkpoint_writer

    cursor = {"consumed_rows": 8 * iteration}
    extra = {"cursor": cursor}
    return Path(checkpoint_writer.save(trainer, str(folder), iteration, extra, base=base))


def train(trainer: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        report, ranks = batch(step, trainer.layout)
        result = trainer.train_step(report, ranks[trainer.layout.data_rank(trainer.rank)])
        assert result.skip is None
        losses.append(result.loss)
    return losses


def adapter_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter, with those of its optimizer."""
    tensors = {
        name: weight.detach().clone()
        for name, weight in trainer.gpt.named_parameters()
        if weight.requires_grad
    }
    adam = trainer.optimizer.chained_optimizers[0].optimizer
    for number, state in enumerate(adam.state.values()):
        tensors |= {f"{number} {key}": torch.as_tensor(value) for key, value in state.items()}
    return tensors


def require_equal(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


def num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_a_checkpoint_holds_the_adapter_alone(hf: Path, saved: Saved, tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing

    shape = read_shape(str(hf))
    folder = Path(saved.url, "iter_0000003")
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    keys = {parameter.megatron for parameter in adapter_parameters(shape, LORA.adapter)}
    assert keys < stored.keys()
    assert all(key.endswith(tuple(keys)) for key in stored), "an optimizer's have a prefix"

    num_values = sum(_size(stored[key]) for key in keys)
    tensor_bytes = 16 * num_values  # weights, masters and two moments, in float32
    full, _ = begin(new_start(hf), hf, lora=None)
    train(full, range(1))
    whole = num_bytes(save(full, tmp_path, None))
    own = num_bytes(folder)
    assert tensor_bytes < own < 2 * tensor_bytes + 200_000
    assert own < whole / 4

    extra = json.loads((folder / EXTRA).read_text())
    assert extra["adapter"] == LORA.adapter.to_json()
    assert extra["base"]["url"] == str(hf)
    assert set(extra["base"]["checksums"]) == {"float32", "bfloat16", "float16"}
    assert extra["cursor"] == {"consumed_rows": 24}


def _size(tensor: Any) -> int:
    return int(np.prod(tensor.global_shape))


def test_resume_is_bit_by_bit(hf: Path, saved: Saved, tmp_path: Path) -> None:
    trainer, base = begin(saved.start(hf), hf)
    loaded = adapter_of(trainer)
    save(trainer, tmp_path, base)
    again = replace(saved.start(hf), checkpoint=find(str(tmp_path)))
    require_equal(adapter_of(begin(again, hf)[0]), loaded)

    assert train(trainer, range(3, 5)) == saved.losses
    require_equal(adapter_of(trainer), saved.adapter)


def go_on(layout: Layout, rank: int, meeting: Path, start_point: StartPoint, hf: Path) -> Any:
    """Train two steps on another layout; return their losses, and save."""
    start(layout, rank, meeting)
    trainer, base = begin(start_point, hf, layout=layout, rank=rank)
    losses = train(trainer, range(3, 5))
    save(trainer, hf.parent / f"run-{layout.tensor}-{layout.pipeline}", base, 5)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_resume_at_another_layout(hf: Path, saved: Saved, name: str) -> None:
    """And back on one rank. The base has the same checksum on all of them."""
    layout = LAYOUTS[name]
    *_, losses = run_ranks(go_on, layout, saved.start(hf), hf)
    np.testing.assert_allclose(losses, saved.losses, rtol=0, atol=1e-4)

    checkpoint = find(str(hf.parent / f"run-{layout.tensor}-{layout.pipeline}"))
    trainer, _ = begin(replace(saved.start(hf), checkpoint=checkpoint), hf)
    for parameter, weight in trainer.gpt.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(weight.detach(), saved.adapter[parameter], rtol=0, atol=1e-3)


def test_another_base_is_refused(hf: Path, saved: Saved, tmp_path: Path) -> None:
    """One weight differs in its last bit."""
    import shutil

    other = Path(shutil.copytree(hf, tmp_path / "other"))
    begin(saved.start(other), hf)

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        bits = tensors["model.layers.2.mlp.up_proj.weight"].view(torch.int32)
        bits[5, 7] ^= 1

    edit_tensors(other, flip)
    with pytest.raises(CheckpointError, match=rf"^{other}: not the weights") as raised:
        begin(saved.start(other), hf)
    text = str(raised.value)
    assert text.endswith(f"Give those that it began from, with --ref-load {hf}")
    observed("other base than the one that a LoRA run began from", text, "not the weights", NOTHING)


def test_the_base_is_known_in_another_precision(hf: Path, saved: Saved) -> None:
    trainer, base = begin(saved.start(hf), hf, precision=Precision.BF16)
    assert list(base.checksums) == ["bfloat16"]
    assert len(train(trainer, range(3, 4))) == 1


def test_swapped_layers_are_another_base(hf: Path, saved: Saved, tmp_path: Path) -> None:
    import shutil

    other = Path(shutil.copytree(hf, tmp_path / "other"))

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (1, 2)]
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]

    edit_tensors(other, swap)
    with pytest.raises(CheckpointError, match="not the weights that the adapter in"):
        begin(saved.start(other), hf)
    with pytest.raises(CheckpointError, match="not the weights that the adapter in"):
        merge_adapter(saved.url, str(other), Targets(str(tmp_path / "merged"), None))
    assert not (tmp_path / "merged").exists()


def test_merged_weights_compute_what_the_run_does(hf: Path, saved: Saved, tmp_path: Path) -> None:
    """In either format. The checksum that the ranks stated is that of the files."""
    targets = Targets(str(tmp_path / "merged"), str(tmp_path / "megatron"))
    merge_adapter(saved.url, str(hf), targets)

    unmerged, _ = begin(saved.start(hf), hf)
    base, _ = begin(new_start(hf), hf, None)
    logits = unmerged.logits(PROMPT)
    assert np.abs(logits - base.logits(PROMPT)).max() > 1e-3, "the adapter does something"
    megatron = find(str(tmp_path / "megatron"))
    assert megatron is not None
    for start_point in (new_start(tmp_path / "merged"), StartPoint(megatron, False)):
        merged, _ = begin(start_point, hf, None)
        np.testing.assert_allclose(merged.logits(PROMPT), logits, rtol=0, atol=1e-4)


def test_an_adapter_is_no_model_even_without_its_miles_json(hf: Path, saved: Saved) -> None:
    url = f"{saved.url}/iter_0000003"
    start = StartPoint(SavedCheckpoint(url, 3, None), False)
    for lora in (None, LORA):
        with pytest.raises(CheckpointError, match="holds an adapter, and no whole model"):
            begin(start, hf, lora)


def test_megatrons_own_model_does_not_take_an_adapter_for_one(hf: Path, saved: Saved) -> None:
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException

    state = plain_megatron.build(read_shape(str(hf))).sharded_state_dict()
    with pytest.raises(CheckpointException, match="from model not in state dict"):
        dist_checkpointing.load({"model": state}, f"{saved.url}/iter_0000003")


def test_an_adapter_of_peft_trains_on(hf: Path, tmp_path: Path) -> None:
    settings = {"target_modules": list(PEFT.targets)}
    save_with_peft(hf, tmp_path / "peft", dtype=torch.float32, **settings)
    lora = AdapterSettings(PEFT, dropout=0.0, seed=3)
    trainer, _ = begin(new_start(hf, tmp_path / "peft"), hf, lora)
    logits = trainer.logits(PROMPT)
    np.testing.assert_allclose(logits, peft_logits(hf, tmp_path / "peft"), rtol=0, atol=1e-4)
    plain, _ = begin(new_start(hf), hf, lora)
    assert np.abs(logits - plain.logits(PROMPT)).max() > 0.01, "the adapter does something"

    losses = train(trainer, range(3))
    assert losses[-1] != losses[0]


def test_an_export_is_an_adapter_of_peft(hf: Path, saved: Saved, tmp_path: Path) -> None:
    from miles.train.rank import weight_boxes

    trainer, _ = begin(saved.start(hf), hf)
    shape = read_shape(str(hf))
    keys = [parameter.megatron for parameter in adapter_parameters(shape, LORA.adapter)]
    plan = AdapterPlan(str(hf), shape, LORA.adapter, dict.fromkeys(keys, DTYPES[Precision.FP32]))
    plan.create(tmp_path).close()
    part = weight_boxes.write_weights(trainer, tmp_path)
    assert (part.num_bytes, part.failure) == (plan.num_bytes, None)
    plan.complete(tmp_path, None)
    logits = trainer.logits(PROMPT)
    np.testing.assert_allclose(logits, peft_logits(hf, tmp_path), rtol=0, atol=1e-4)


def peft_logits(hf: Path, adapter: Path) -> np.ndarray:
    """Return the logits of a model with an adapter, as peft computes them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.no_grad():
        logits: np.ndarray = adapted(torch.tensor([PROMPT])).logits[0].numpy()
    return logits


def test_a_weight_of_the_adapter_that_is_not_finite_is_named(hf: Path, tmp_path: Path) -> None:
    save_with_peft(hf, tmp_path, dtype=torch.float32, target_modules=list(PEFT.targets))
    file = tmp_path / "adapter_model.safetensors"

    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    tensors[name][3, 1] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lora_B\.weight \(1 value\): not finite") as raised:
        begin(new_start(hf, tmp_path), hf, AdapterSettings(PEFT, 0.0, 3))
    assert f"{tmp_path}: {name}" in str(raised.value)
