"""Targets of adapters by any of their names, and the sizes of their tensors."""

from __future__ import annotations

import pytest

from miles.architecture.adapter import (
    ATTENTION_TARGETS,
    MLP_TARGETS,
    TARGETS,
    AdapterShape,
    adapter_parameters,
    described,
    projection_sizes,
    resolve_targets,
    total_adapter_parameters,
)
from miles.architecture.families import hf_shapes, shape_of
from miles.errors import ConfigError
from tests.support.launch import QWEN3, QWEN3_MOE

DENSE = shape_of(QWEN3, "config.json")
MOE = shape_of(QWEN3_MOE, "config.json")


@pytest.mark.parametrize(
    ("names", "excluded", "targets"),
    [
        (["all-linear"], [], TARGETS),
        (["v_proj", "q_proj", "q_proj"], [], ("q_proj", "v_proj")),
        (["linear_qkv", "linear_fc2"], ["k_proj"], ("q_proj", "v_proj", "down_proj")),
        (["all-linear"], ["linear_fc1", "linear_fc2"], ATTENTION_TARGETS),
    ],
)
def test_targets_have_several_names(
    names: list[str], excluded: list[str], targets: tuple[str, ...]
) -> None:
    assert resolve_targets(DENSE, names, excluded) == targets


@pytest.mark.parametrize(
    ("names", "excluded", "message"),
    [
        (["w_pack"], [], "--target-modules w_pack: no projection has this name"),
        (["q_proj"], ["lm_head"], "--exclude-modules lm_head: no projection has this name"),
        (["linear_qkv"], ["q_proj", "k_proj", "v_proj"], "--exclude-modules leaves out all"),
        (["all-linear"], ["all-linear"], "--exclude-modules leaves out all of them"),
        ([], [], "no projection to train: --target-modules names none"),
    ],
)
def test_other_names_are_refused(names: list[str], excluded: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_targets(DENSE, names, excluded)


def test_experts_have_no_adapters() -> None:
    assert resolve_targets(MOE, ["all-linear"]) == ATTENTION_TARGETS
    with pytest.raises(ConfigError, match=r"down_proj are those of experts"):
        resolve_targets(MOE, ["q_proj", "down_proj"])
    assert resolve_targets(MOE, [*ATTENTION_TARGETS, *MLP_TARGETS], MLP_TARGETS)


def test_pairs_fit_the_weights_that_they_stand_beside() -> None:
    weights = hf_shapes(DENSE)
    adapter = AdapterShape(4, 8.0, TARGETS)
    tensors = {}
    for parameter in adapter_parameters(DENSE, adapter):
        for layer in range(DENSE.num_layers):
            tensors[parameter.hf_names((layer,))[0]] = parameter.shape

    assert len(tensors) == 2 * len(TARGETS) * DENSE.num_layers
    for name, sizes in tensors.items():
        weight = name.removeprefix("base_model.model.").rsplit(".", 2)[0]
        num_out, num_in = weights[f"{weight}.weight"]
        assert sizes == ((4, num_in) if ".lora_A." in name else (num_out, 4)), name
        assert projection_sizes(DENSE, weight.rsplit(".", 1)[1]) == (num_out, num_in)


def test_the_scale_is_alpha_by_rank_or_its_root() -> None:
    plain = AdapterShape(16, 32.0, ("q_proj",))
    stabilized = AdapterShape(16, 32.0, ("q_proj",), is_rank_stabilized=True)
    assert (plain.scale, stabilized.scale) == (2.0, 8.0)
    assert AdapterShape.from_json(stabilized.to_json()) == stabilized


def test_an_adapter_is_described_in_a_phrase() -> None:
    adapter = AdapterShape(4, 8.0, ("q_proj", "down_proj"))
    trained = total_adapter_parameters(DENSE, adapter)
    text = described(DENSE, adapter, 100 * trained)
    assert text.startswith(f"{trained:,} parameters beside {100 * trained:,} frozen ones (1.00%)")
    assert text.endswith("rank 4, scale 2, on q_proj, down_proj")
