"""A plain megatron-core model reads what we write, and we read what it writes."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles.architecture.families import model_types, read_shape
from miles.common.checkpoint_tracker import TRACKER
from miles.convert.hf_to_megatron import hf_to_megatron
from miles.convert.megatron_to_hf import megatron_to_hf
from miles.convert.verify import verify
from miles.train.parallel_layout import Layout
from tests.support import plain_megatron
from tests.support.models import SIZES, make_hf, require_same_files
from tests.support.ranks import SHAPE, batch, run_ranks, start, trainer_settings

MAX_LOGIT_DIFFERENCE = 1e-4
TIED = {"qwen3": True, "qwen3_moe": False, "qwen2": False, "llama": True}

ATTENTION = ["linear_qkv", "linear_proj"]
TE_ATTENTION = ["core_attention"]
HEAD_NORMS = ["q_layernorm", "k_layernorm"]
MLP = ["mlp.linear_fc1", "mlp.linear_fc2"]
EXPERTS = ["mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2"]


def of_layers(names: Sequence[str]) -> set[str]:
    return {f"decoder.layers.{name}._extra_state" for name in names}


def of_attention(*names: str) -> set[str]:
    return of_layers([f"self_attention.{name}" for name in names])


FINAL = {"decoder.final_layernorm._extra_state"}
LOCAL = {
    "llama": of_attention(*ATTENTION) | of_layers(MLP),
    "qwen2": of_attention(*ATTENTION) | of_layers(MLP),
    "qwen3": of_attention(*ATTENTION) | of_layers(MLP),
    "qwen3_moe": of_attention(*ATTENTION) | of_layers(EXPERTS),
}
"""The extra states of Megatron's local layers."""
ENGINE = {
    "llama": of_attention(*TE_ATTENTION) | FINAL,
    "qwen2": of_attention(*TE_ATTENTION) | FINAL,
    "qwen3": of_attention(*TE_ATTENTION, *HEAD_NORMS) | FINAL,
    "qwen3_moe": of_attention(*TE_ATTENTION, *HEAD_NORMS)
    | of_layers(["pre_mlp_layernorm"])
    | FINAL,
}
"""Those that Transformer Engine's layers have besides."""
EXPERTS_NORM = "decoder.layers.pre_mlp_layernorm.weight"
ENGINE_TENSORS = {"qwen3_moe": {EXPERTS_NORM}}
"""The tensors to which Transformer Engine's layers give other keys."""


@dataclass(frozen=True)
class Folders:
    """The checkpoints of one family."""

    hf: str
    converted: str
    trained: str
    """by our trainer, from the converted one"""
    plain: str
    """by a plain Megatron model with the converted weights"""
    old: str
    """the trained one, as an older version of ours wrote it"""
    engine: str
    """the same as `plain`, with the keys of Transformer Engine's layers"""


@dataclass(frozen=True)
class Found:
    """The results of one family: keys, logits and moments that the models read."""

    missing: dict[str, set[str]]
    """of the converted and of the trained one: keys in it that a plain model has no use for"""
    unexpected: set[str]
    plain: np.ndarray
    """logits of a plain model with the converted weights"""
    trained: tuple[np.ndarray, np.ndarray]
    """logits after training: ours, and those of a plain model with the trained weights"""
    ours: dict[str, np.ndarray]
    """logits of our model with the weights of the plain model's checkpoints"""
    from_old: np.ndarray
    """our logits with the trained weights, as an older version saved them"""
    moments: list[np.ndarray]
    """of the optimizer: ours, and those that a plain model loads, by the keys of either layers"""


TEXT = list(range(7, 107))


def work(layout: Layout, rank: int, meeting: Path, folders: list[Folders]) -> list[Found]:
    start(layout, rank, meeting)
    return [_work_on(one) for one in folders]


def _work_on(folders: Folders) -> Found:
    from miles.train.rank import checkpoint_writer
    from miles.train.rank.trainer import Trainer

    shape = read_shape(folders.hf)
    model = plain_megatron.build(shape)
    missing = {}
    missing["converted"], unexpected = _load(model, Path(folders.converted, "release"))
    converted_logits = plain_megatron.logits(model, TEXT)
    plain_megatron.save(model.sharded_state_dict(), shape, Path(folders.plain), 5)
    plain_megatron.save(_as_engine(model), shape, Path(folders.engine), 5)

    trainer = Trainer(trainer_settings(shape, Layout(1)), 0)
    ours = {}
    for name in ("plain", "engine"):
        _resume(trainer, getattr(folders, name))
        ours[name] = trainer.logits(TEXT)

    for step in range(2):  # the first has a learning rate of 0
        report, shards = batch(step, Layout(1))
        trainer.train_step(report, shards[0])
    checkpoint_writer.save(trainer, folders.trained, 6, {"cursor": {"consumed_rows": 7}})
    missing["trained"], more = _load(model, Path(folders.trained, "iter_0000006"))
    trained = (trainer.logits(TEXT), plain_megatron.logits(model, TEXT))

    _make_old(Path(folders.trained, "iter_0000006"), Path(folders.old, "iter_0000006"))
    _resume(trainer, folders.plain)
    _resume(trainer, folders.old, model_only=False)
    from_old = trainer.logits(TEXT)

    moments = [plain_megatron.moments(trainer.optimizer)]
    for state in (model.sharded_state_dict(), _as_engine(model)):
        optimizer = plain_megatron.build_optimizer(model)
        plain_megatron.load_with_optimizer(state, optimizer, Path(folders.trained, "iter_0000006"))
        moments.append(plain_megatron.moments(optimizer))
    return Found(missing, unexpected | more, converted_logits, trained, ours, from_old, moments)


def _make_old(folder: Path, old: Path) -> None:
    """Copy a checkpoint and leave out what older versions did not write."""
    shutil.copytree(folder, old)
    (old.parent / TRACKER).write_text("6")
    (old / "miles.json").write_text("{}")
    metadata = pickle.loads((old / ".metadata").read_bytes())
    for key in list(metadata.state_dict_metadata):
        if key.endswith(EXPERTS_NORM) or "_extra_state" in key:
            del metadata.state_dict_metadata[key]
    (old / ".metadata").write_bytes(pickle.dumps(metadata))

    common = torch.load(old / "common.pt", weights_only=False)
    del common["content_metadata"], common["args"].no_save_rng, common["args"].no_save_optim
    torch.save(common, old / "common.pt")


def _resume(trainer: Any, url: str, *, model_only: bool = True) -> None:
    from miles.common import checkpoint_folder
    from miles.train.rank import checkpoint_load

    found = checkpoint_folder.find(url)
    assert found is not None
    checkpoint_load.load(trainer, found, model_only=model_only)


def _load(model: Any, folder: Path) -> tuple[set[str], set[str]]:
    """Load all of a plain model's state, as Megatron-LM does, under every strictness.

    Returns:
        the keys of the checkpoint that the model does not have, and those that it lacks.
    """
    from megatron.core import dist_checkpointing

    def load(**options: Any) -> Any:
        return dist_checkpointing.load(
            {"model": model.sharded_state_dict()}, str(folder), **options
        )

    loaded = load()  # the default of Megatron-LM
    load(strict="raise_unexpected")
    _, missing, unexpected = load(strict="return_all")
    model.load_state_dict(loaded["model"])
    return missing, unexpected


def _as_engine(model: Any) -> dict[str, Any]:
    """Return a model's state with the one key that Transformer Engine's layers name otherwise."""
    state = {}
    for name, value in model.sharded_state_dict().items():
        if ".pre_mlp_layernorm." in name and model.config.num_moe_experts:
            value = replace(value, key=EXPERTS_NORM)
        state[name] = value
    return state


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folders]:
    made = {}
    for model_type in model_types():
        root = tmp_path_factory.mktemp(model_type)
        hf = make_hf(root / "hf", model_type, tied=TIED[model_type], vocab_size=SHAPE.vocab_size)
        names = ("converted", "trained", "plain", "old", "engine")
        made[model_type] = Folders(str(hf), *(str(root / name) for name in names))
        hf_to_megatron(str(hf), made[model_type].converted)
    return made


@pytest.fixture(scope="module")
def found(folders: dict[str, Folders]) -> dict[str, Found]:
    (result,) = run_ranks(work, Layout(1), list(folders.values()))
    return dict(zip(folders, result, strict=True))


@pytest.mark.parametrize("model_type", model_types())
def test_a_plain_model_reads_every_checkpoint(found: dict[str, Found], model_type: str) -> None:
    """It asks for nothing that is not there, and all that it leaves is Transformer Engine's.

    `raise_all` refuses a checkpoint with a key that the model does not have. So no file with the
    keys of both kinds of layers passes it. `return_all` makes the same comparison, and names them.
    """
    result = found[model_type]
    assert not result.unexpected
    of_engine = ENGINE[model_type] | ENGINE_TENSORS.get(model_type, set())
    assert result.missing["converted"] == of_engine
    of_model = {key for key in result.missing["trained"] if not key.startswith("optimizer")}
    assert of_model == of_engine
    ours, plain = result.trained
    assert np.abs(ours - plain).max() < MAX_LOGIT_DIFFERENCE
    assert np.abs(ours - result.plain).max() > 100 * MAX_LOGIT_DIFFERENCE  # it did train


@pytest.mark.parametrize("model_type", model_types())
def test_a_plain_optimizer_continues(found: dict[str, Found], model_type: str) -> None:
    """Its format is stated in the checkpoint, where Megatron-LM's loader looks for it."""
    ours, plain, engine = found[model_type].moments
    assert np.abs(ours).max() > 0
    assert np.array_equal(ours, plain)
    assert np.array_equal(ours, engine)


@pytest.mark.parametrize("model_type", model_types())
def test_an_old_checkpoint_continues(
    folders: dict[str, Folders], found: dict[str, Found], model_type: str
) -> None:
    assert np.array_equal(found[model_type].from_old, found[model_type].trained[0])
    assert not verify(folders[model_type].old, folders[model_type].trained).differences


def test_what_the_common_part_says(folders: dict[str, Folders], found: dict[str, Found]) -> None:
    """Megatron-LM's loader asks for no random state, and for an optimizer where there is one."""
    one = folders["qwen3"]
    common = {
        name: torch.load(Path(folder, "common.pt"), weights_only=False)
        for name, folder in (
            ("converted", f"{one.converted}/release"),
            ("trained", f"{one.trained}/iter_0000006"),
        )
    }
    assert [content["iteration"] for content in common.values()] == [0, 6]
    assert [content["checkpoint_version"] for content in common.values()] == [3.0, 3.0]
    for name, (rows, has_no_optimizer) in {"converted": (0, True), "trained": (7, False)}.items():
        args = vars(common[name]["args"])
        expected = {
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "padded_vocab_size": SHAPE.vocab_size,
            "consumed_train_samples": rows,
            "no_save_rng": True,
            "no_save_optim": has_no_optimizer,
        }
        assert {key: args[key] for key in expected} == expected
    assert common["trained"]["content_metadata"] == {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }
    # Adam of Transformer Engine and of Apex asks for it.
    groups = common["trained"]["optimizer"]["optimizer"]["param_groups"]
    assert {group["bias_correction"] for group in groups} == {True}


@pytest.mark.parametrize("model_type", model_types())
def test_a_plain_model_has_the_logits_of_transformers(
    folders: dict[str, Folders], found: dict[str, Found], model_type: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders[model_type].hf, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([TEXT])).logits[0].numpy()
    assert np.abs(expected).max() > 0.1
    assert np.abs(found[model_type].plain - expected).max() < MAX_LOGIT_DIFFERENCE


@pytest.mark.parametrize("model_type", model_types())
@pytest.mark.parametrize("kind", ["plain", "engine"])
def test_the_checkpoint_of_a_plain_model_is_read(
    folders: dict[str, Folders], found: dict[str, Found], model_type: str, kind: str, tmp_path: Path
) -> None:
    """Converted back, compared, and loaded to train on: the weights are those that it had."""
    one = folders[model_type]
    saved = getattr(one, kind)
    megatron_to_hf(saved, one.hf, str(tmp_path / "back"))
    require_same_files(Path(one.hf), tmp_path / "back")
    assert not verify(saved, one.converted).differences
    result = found[model_type]
    assert np.abs(result.ours[kind] - result.plain).max() < MAX_LOGIT_DIFFERENCE


@pytest.mark.parametrize("model_type", model_types())
def test_the_extra_states_of_both_specifications(
    folders: dict[str, Folders], found: dict[str, Found], model_type: str
) -> None:
    """One for each layer or expert, in the checkpoints of both writers; each is empty."""
    layers = SIZES["num_hidden_layers"]
    expected = set()
    for key in LOCAL[model_type] | ENGINE[model_type]:
        if key in FINAL:
            expected.add(f"{key}/shard_0_1")
        elif ".experts." in key:
            expected |= {f"{key}/shard_{i}.{j}_{layers}.4" for i in range(layers) for j in range(4)}
        else:
            expected |= {f"{key}/shard_{i}_{layers}" for i in range(layers)}

    one = folders[model_type]
    for folder in (Path(one.converted, "release"), Path(one.trained, "iter_0000006")):
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        objects = {key for key in metadata.state_dict_metadata if "_extra_state" in key}
        assert objects == expected
        for index, info in metadata.storage_data.items():
            if index.fqn in expected:
                with open(folder / info.relative_path, "rb") as file:
                    file.seek(info.offset)
                    (folder.parent / "object").write_bytes(file.read(info.length))
                assert torch.load(folder.parent / "object", weights_only=True) == [None]
