"""PEFT's format, both ways: its own loader takes what is written, what it saved is read exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from miles.architecture.adapter import TARGETS, AdapterShape, adapter_parameters, module_of
from miles.architecture.config import ModelShape
from miles.architecture.families import pieces_in, read_shape
from miles.cli import main
from miles.convert.box_writer import BoxWriter
from miles.convert.megatron_to_hf import megatron_to_hf
from miles.convert.peft_adapter import AdapterPlan, read_adapter
from miles.convert.peft_config import CONFIG
from miles.convert.safetensors_headers import ADAPTER
from miles.errors import CheckpointError, ConfigError
from tests.support.adapters import ATTENTION, save_as_run, save_with_peft
from tests.support.models import make_hf

PREFIX = "base_model.model."
TOKENS = torch.arange(12).view(1, 12) % 7


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of several families."""
    folder = tmp_path_factory.mktemp("models")
    return {
        family: make_hf(folder / family, family, tied=family == "qwen3")
        for family in ("qwen3", "llama", "qwen3_moe")
    }


@pytest.fixture
def qwen3(models: dict[str, Path]) -> Path:
    return models["qwen3"]


@pytest.fixture(scope="module")
def saved(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the Qwen3 model's q_proj and down_proj that PEFT saved."""
    folder = tmp_path_factory.mktemp("saved")
    targets = ["q_proj", "down_proj"]
    save_with_peft(models["qwen3"], folder, dtype=torch.float32, target_modules=targets)
    return folder


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """The same, for a test to change."""
    return shutil.copytree(saved, tmp_path / "adapter")


def edit_settings(folder: Path, **settings: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def read_all(folder: Path | str, shape: ModelShape) -> dict[str, Tensor]:
    """Return an adapter's tensors by PEFT's names, read as boxes of the Megatron tensors."""
    opened = read_adapter(str(folder), shape)
    tensors = {}
    for parameter, place in pieces_in(adapter_parameters(shape, opened.shape), shape):
        dtype = opened.dtypes[parameter.megatron]
        target = torch.full(parameter.shape, 7.0, dtype=dtype)
        (name,) = parameter.hf_names(place)
        tensors[name] = opened.read(parameter.megatron, place, [0, 0], target)
    return tensors


def logits_by_hand(hf: Path, adapter: AdapterShape, tensors: dict[str, Tensor]) -> Tensor:
    """Return the logits of the base whose weights have had scale B A added to them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    with torch.no_grad():
        for layer in range(model.config.num_hidden_layers):
            for target in adapter.targets:
                module = module_of(target).format(layer=layer)
                a = tensors[f"{PREFIX}{module}.lora_A.weight"]
                b = tensors[f"{PREFIX}{module}.lora_B.weight"]
                model.get_submodule(module).weight += adapter.scale * b @ a
        return model(TOKENS).logits


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        ("qwen3", AdapterShape(4, 6.0, TARGETS)),
        ("llama", AdapterShape(3, 0.5, ("k_proj", "up_proj"), is_rank_stabilized=True)),
        ("qwen3_moe", AdapterShape(4, 8.0, ATTENTION)),
    ],
)
def test_peft_loads_what_is_exported(
    family: str, adapter: AdapterShape, models: dict[str, Path], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    hf = models[family]
    tensors = save_as_run(hf, tmp_path / "run", adapter)
    megatron_to_hf(str(tmp_path / "run"), str(hf), str(tmp_path / "out"))

    base = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    loaded = model.state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], tensor), name
    assert sum("lora_" in name for name in loaded) == len(tensors)

    with torch.no_grad():
        logits = model(TOKENS).logits
        assert (logits - logits_by_hand(hf, adapter, tensors)).abs().max() < 1e-4
        with model.disable_adapter():
            assert (logits - model(TOKENS).logits).abs().max() > 0.01, "it does something"


@pytest.mark.parametrize(
    ("family", "dtype", "settings", "expected"),
    [
        (
            "qwen3",
            torch.bfloat16,
            {"target_modules": "all-linear", "use_rslora": True},
            AdapterShape(4, 6.0, TARGETS, is_rank_stabilized=True),
        ),
        (
            "llama",
            torch.float32,
            {
                "target_modules": r".*\.(v_proj|gate_proj)",  # a pattern
                "lora_alpha": 2.5,
                "rank_pattern": {"v_proj": 4},
                "lora_dropout": 0.1,
            },
            AdapterShape(4, 2.5, ("v_proj", "gate_proj")),
        ),
        (
            "qwen3_moe",
            torch.float32,
            {"target_modules": list(ATTENTION), "exclude_modules": ["o_proj"]},
            AdapterShape(4, 6.0, ("q_proj", "k_proj", "v_proj")),
        ),
    ],
)
def test_what_peft_saves_is_read_exactly(
    family: str,
    dtype: torch.dtype,
    settings: dict[str, Any],
    expected: AdapterShape,
    models: dict[str, Path],
    tmp_path: Path,
) -> None:
    save_with_peft(models[family], tmp_path / "adapter", dtype=dtype, **settings)
    shape = read_shape(str(models[family]))
    assert read_adapter(str(tmp_path / "adapter"), shape).shape == expected

    stored = load_file(tmp_path / "adapter" / ADAPTER)
    found = read_all(tmp_path / "adapter", shape)
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == dtype
        assert torch.equal(found[name], tensor), name


def test_ranks_write_the_file_that_a_conversion_writes(qwen3: Path, tmp_path: Path) -> None:
    """Each box of a tensor that a rank holds goes to its place; PEFT would write the same bytes."""
    adapter = AdapterShape(4, 8.0, ("q_proj", "down_proj"))
    tensors = save_as_run(qwen3, tmp_path / "run", adapter, dtype=torch.bfloat16)
    megatron_to_hf(str(tmp_path / "run"), str(qwen3), str(tmp_path / "converted"))

    shape = read_shape(str(qwen3))
    parameters = adapter_parameters(shape, adapter)
    dtypes = {parameter.megatron: torch.bfloat16 for parameter in parameters}
    plan = AdapterPlan(str(qwen3), shape, adapter, dtypes)
    (tmp_path / "written").mkdir()
    plan.create(tmp_path / "written").close()
    writer = BoxWriter(tmp_path / "written", shape, adapter)
    num_bytes = 0
    for parameter, place in plan.pieces:
        (name,) = parameter.hf_names(place)
        for columns in (slice(0, 3), slice(3, None)):
            box = tensors[name][:, columns].float()
            num_bytes += writer.write(parameter.megatron, place, [0, columns.start], box)
    writer.sync()
    writer.close()
    plan.complete(tmp_path / "written", None)

    assert num_bytes == plan.num_bytes
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    theirs = (tmp_path / "theirs").read_bytes()
    names = {path.name for path in (tmp_path / "converted").iterdir()}
    assert names == {ADAPTER, CONFIG, "chat_template.jinja"}
    for name in names:
        written = (tmp_path / "written" / name).read_bytes()
        assert written == (tmp_path / "converted" / name).read_bytes(), name
        assert name != ADAPTER or written == theirs


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA': an adapter of another kind"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS': a model with another head"),
        ({"use_dora": True}, "use_dora is True: DoRA, which scales each row"),
        ({"bias": "all"}, "bias is 'all': biases trained beside"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True: weights that are stored the other"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]: whole modules"),
        ({"layers_to_transform": [0]}, r"layers_to_transform is \[0\]: adapters of some layers"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa': an adapter that belongs"),
        ({"of_next_year": 1}, "of_next_year is 1: a setting that is not known here"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern gives 8 to q_proj, the others have 4"),
        ({"alpha_pattern": {"k": 7}}, "alpha_pattern gives 7 to k, the others have 6"),
        ({"r": 10**9}, "r is 1000000000; a rank from 1 to"),
        ({"r": True}, "r is True; a rank"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000.*; a number above 0 was expected"),
        ({"lora_alpha": "6"}, "lora_alpha is '6'; a number above 0"),
        ({"use_rslora": "no"}, "use_rslora is 'no'; true or false"),
        ({"target_modules": [1]}, r"target_modules is \[1\]; a list of names"),
        ({"target_modules": ["q_proj", "v_proj"]}, "target_modules names v_proj, of which"),
        ({"target_modules": ["q_proj", "lm_head"]}, "names lm_head, which has no adapter here"),
        (
            {"target_modules": ["q_proj", "model.embed_tokens"]},
            "target_modules names embed_tokens, which has no adapter here, only q_proj, k_proj, ",
        ),
        ({"r": 8}, r"lora_A\.weight has shape \(4, .*; rank 8 \(adapter_config\.json\) and the"),
    ],
)
def test_settings_are_refused_by_name(
    settings: dict[str, Any], found: str, adapter: Path, qwen3: Path
) -> None:
    edit_settings(adapter, **settings)
    with pytest.raises(CheckpointError, match=found) as caught:
        read_adapter(str(adapter), read_shape(str(qwen3)))
    assert str(caught.value).startswith(str(adapter))
    assert "\n" not in str(caught.value)


def test_what_is_null_is_false(adapter: Path, qwen3: Path) -> None:
    """As PEFT takes it."""
    own = read_adapter(str(adapter), read_shape(str(qwen3))).shape
    names = ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "inference_mode")
    edit_settings(adapter, **dict.fromkeys(names))
    assert read_adapter(str(adapter), read_shape(str(qwen3))).shape == own


Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda held: held.pop(Q0), f"tensor {Q0} is missing; other layers have one"),
        (lambda held: held.update({Q0: held[Q0].T.contiguous()}), f"{Q0} has shape"),
        (lambda held: held.update({Q0: held[Q0].bfloat16()}), "keeps them in one tensor"),
        (lambda held: held.update({Q0: held[Q0].to(torch.float8_e4m3fn)}), "float8_e4m3fn; bfl"),
        (
            lambda held: held.update({Q0.replace("layers.0", "layers.9"): held[Q0].clone()}),
            "layers.9.self_attn.q_proj.lora_A.weight is of a layer that the model does not have",
        ),
        (
            lambda held: held.update({Q0.replace("self_attn", "mlp"): held[Q0].clone()}),
            "mlp.q_proj.lora_A.weight is not one of an adapter of this model's q_proj",
        ),
        (
            lambda held: held.update({"lm_head.weight": held[Q0].clone()}),
            "tensor lm_head.weight is not",
        ),
        (lambda held: held.clear(), "holds no tensor of an adapter"),
    ],
)
def test_tensors_are_refused_by_name(change: Any, found: str, adapter: Path, qwen3: Path) -> None:
    tensors = load_file(adapter / ADAPTER)
    change(tensors)
    save_file(tensors, adapter / ADAPTER)
    edit_settings(adapter, target_modules="all-linear")
    with pytest.raises(CheckpointError) as caught:
        read_adapter(str(adapter), read_shape(str(qwen3)))
    assert found in str(caught.value)
    assert str(adapter / ADAPTER) in str(caught.value)


def test_experts_have_no_adapters(adapter: Path, models: dict[str, Path]) -> None:
    with pytest.raises(
        CheckpointError, match=r"target_modules names down_proj, which has no adapter here, only q"
    ):
        read_adapter(str(adapter), read_shape(str(models["qwen3_moe"])))


def test_an_export_replaces_exports_of_adapters_alone(qwen3: Path, tmp_path: Path) -> None:
    save_as_run(qwen3, tmp_path / "run", AdapterShape(4, 8.0, ("q_proj",)))
    words = ["convert", "megatron-to-hf", "--load", str(tmp_path / "run")]
    words += ["--hf-checkpoint", str(qwen3), "--save", str(tmp_path / "out")]
    assert main(words) == 0
    assert main(words) == 0
    with pytest.raises(
        ConfigError, match=r"--max-shard-size: .*iter_0000007 holds an adapter, whi"
    ):
        megatron_to_hf(
            str(tmp_path / "run"), str(qwen3), str(tmp_path / "out"), max_shard_bytes=1000
        )

    (tmp_path / "out/model.safetensors").write_bytes(b"a model's")
    with pytest.raises(CheckpointError, match=r"out: holds model\.safetensors, which no export of"):
        megatron_to_hf(str(tmp_path / "run"), str(qwen3), str(tmp_path / "out"))
    assert (tmp_path / "out/model.safetensors").exists()
