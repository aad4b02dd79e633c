"""Configurations of every family: published models, older ones, those that are not understood."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from miles.architecture.config import HfConfig
from miles.architecture.families import hf_shapes, model_types, parameters_of, shape_of
from miles.errors import CheckpointError
from tests.support.launch import QWEN3_235B
from tests.support.models import EXPERTS, SIZES

QWEN3 = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151_936}
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
QWEN2 = {"model_type": "qwen2", "vocab_size": 151_936}
LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128_256}


def llama_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    }


def sizes(hidden: int, ffn: int, layers: int, heads: int, *, tied: bool = False) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen3-0.6B": (QWEN3 | sizes(1024, 3072, 28, 16, tied=True), 596_049_920),
    "Qwen3-1.7B": (QWEN3 | sizes(2048, 6144, 28, 16, tied=True), 1_720_574_976),
    "Qwen3-4B": (QWEN3 | sizes(2560, 9728, 36, 32, tied=True), 4_022_468_096),
    "Qwen3-8B": (QWEN3 | sizes(4096, 12288, 36, 32), 8_190_735_360),
    "Qwen3-14B": (QWEN3 | sizes(5120, 17408, 40, 40), 14_768_307_200),
    "Qwen3-32B": (QWEN3 | sizes(5120, 25600, 64, 64), 32_762_123_264),
    "Qwen3-30B-A3B": (
        QWEN3_MOE | sizes(2048, 6144, 48, 32) | {"moe_intermediate_size": 768},
        30_532_122_624,
    ),
    "Qwen3-235B-A22B": (
        QWEN3_MOE | sizes(4096, 12288, 94, 64) | {"moe_intermediate_size": 1536},
        235_093_634_560,
    ),
    "Qwen2.5-0.5B": (
        QWEN2 | sizes(896, 4864, 24, 14, tied=True) | {"num_key_value_heads": 2},
        494_032_768,
    ),
    "Qwen2.5-7B": (
        QWEN2 | sizes(3584, 18944, 28, 28) | {"num_key_value_heads": 4, "vocab_size": 152_064},
        7_615_616_512,
    ),
    "Qwen2.5-72B": (
        QWEN2 | sizes(8192, 29568, 80, 64) | {"num_key_value_heads": 8, "vocab_size": 152_064},
        72_706_203_648,
    ),
    "Llama-3-8B": (LLAMA | sizes(4096, 14336, 32, 32), 8_030_261_248),
    "Llama-3.1-70B": (LLAMA | sizes(8192, 28672, 80, 64) | llama_rope(8.0), 70_553_706_496),
    "Llama-3.2-1B": (
        LLAMA | sizes(2048, 8192, 16, 32, tied=True) | llama_rope(32.0),
        1_235_814_400,
    ),
    "Llama-3.2-3B": (
        LLAMA | sizes(3072, 8192, 28, 24, tied=True) | llama_rope(32.0),
        3_212_749_824,
    ),
}
"""The sizes of published models, and the number of parameters that each is published with."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_map_of_a_published_model(name: str) -> None:
    """It has the published number of parameters, and of dense models the tensors of transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values, num_parameters = PUBLISHED[name]
    config = AutoConfig.for_model(**values)
    shape = shape_of(config.to_dict(), name)
    mapped = hf_shapes(shape)
    assert sum(int(np.prod(size)) for size in mapped.values()) == num_parameters
    if shape.num_experts is None:
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config).state_dict()
        if shape.tied_embeddings:
            del made["lm_head.weight"]
        assert mapped == {tensor: tuple(value.shape) for tensor, value in made.items()}


def test_a_configuration_that_is_not_understood() -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(CheckpointError, match=f"there: {message}"):
            shape_of({**config, **changes}, "there")

    config = {
        **PUBLISHED["Llama-3.2-1B"][0],
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "architectures": ["LlamaForCausalLM"],
    }
    assert shape_of(config, "there").rope_scaling_factor == 32
    refused("model_type 'mamba' is not one of llama, qwen2, qwen3, qwen3_moe", model_type="mamba")
    refused(
        r"architectures = \['LlamaForSequenceClassification'\]",
        architectures=["LlamaForSequenceClassification"],
    )
    refused(
        "quantization_config = .*only None is supported",
        quantization_config={"quant_method": "fp8"},
    )
    refused("hidden_act = 'gelu', only 'silu'", hidden_act="gelu")
    refused("hidden_size is missing", hidden_size=None)
    refused(
        "rope type = 'yarn', only 'default'", rope_parameters={"rope_type": "yarn", "factor": 4.0}
    )
    refused(
        r"rope high_freq_factor = 8\.0, only 4\.0",
        rope_parameters={"rope_type": "llama3", "high_freq_factor": 8},
    )
    refused("rope_parameters: factor is missing", rope_parameters={"rope_type": "llama3"})
    refused("attention_bias = True", attention_bias=True)
    for name, value, expected in (
        ("hidden_size", "wide", "a whole number"),
        ("num_hidden_layers", 2.5, "a whole number"),
        ("vocab_size", True, "a whole number"),
        ("head_dim", [64], "a whole number"),
        ("rms_norm_eps", float("nan"), "a finite number above 0"),
        ("rms_norm_eps", "x", "a finite number above 0"),
        ("tie_word_embeddings", "maybe", "true or false"),
        ("rope_scaling", 3, "a JSON object or null"),
        ("rope_parameters", [1], "a JSON object or null"),
        ("rope_parameters", {"full": {"rope_theta": 1.0}}, "one object for all layers"),
    ):
        refused(f"{name} = {re.escape(repr(value))}; {expected}", **{name: value})
    refused("rope_parameters: rope_theta = 'a'; a finite", rope_parameters={"rope_theta": "a"})
    refused("hidden_size = a number of thousands of digits; a whole number", hidden_size=[10**5000])
    refused("num_attention_heads would be 0", num_attention_heads=0)
    with pytest.raises(CheckpointError, match="there: a JSON object was expected"):
        shape_of([config], "there")  # type: ignore[arg-type]
    assert HfConfig({"rope_scaling": {"type": "linear"}}, "there").rope_type == "linear"


def test_two_settings_of_the_rotary_embedding_must_agree() -> None:
    """transformers takes `rope_scaling`, where it is filled, and other libraries the newer name."""
    from transformers import AutoConfig

    scaled = {"rope_type": "linear", "factor": 2.0}
    plain = {"rope_type": "default", "rope_theta": 500.0}
    both = {"rope_parameters": plain, "rope_scaling": scaled}
    taken = AutoConfig.for_model(**PUBLISHED["Qwen3-0.6B"][0], **both).rope_parameters
    assert taken["rope_type"] == "linear"
    with pytest.raises(CheckpointError, match=r"there: rope_scaling = .*linear.* differs from"):
        _ = HfConfig(both, "there").rope
    for same in ({}, {"type": "default"}, plain):
        rope = HfConfig({"rope_parameters": plain, "rope_scaling": same}, "there").rope
        assert rope.values == plain


@pytest.mark.parametrize("model_type", model_types())
def test_a_configuration_without_the_size_of_a_head(model_type: str) -> None:
    """It means what transformers' own model takes it for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**SIZES, "hidden_size": 96, **(EXPERTS if model_type == "qwen3_moe" else {})}
    del values["head_dim"]
    config = AutoConfig.for_model(model_type, vocab_size=192, **values)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    rows = made.model.layers[0].self_attn.k_proj.weight.shape[0]

    stored = {"model_type": model_type, "rms_norm_eps": 1e-6, "vocab_size": 192, **values}
    shape = shape_of(stored, "there")
    assert shape.kv_channels * shape.num_query_groups == rows
    assert shape.kv_channels == (128 if model_type == "qwen3" else 24)
    assert shape_of({**stored, "head_dim": None}, "there") == shape


def test_configurations_of_older_transformers() -> None:
    """They have `rope_theta` and `rope_scaling` at the top, `torch_dtype`, and unused settings."""
    common = {
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "attention_dropout": 0.0,
        "rms_norm_eps": 1e-6,
    }
    qwen = (
        PUBLISHED["Qwen3-4B"][0]
        | common
        | {"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 32_768}
    )
    old = {
        "rope_theta": 1_000_000,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000}}
    shape = shape_of(qwen | old | {"attention_bias": False, "max_window_layers": 36}, "")
    assert shape == shape_of(qwen | new, "")
    assert shape.rotary_base == 1_000_000
    llama = PUBLISHED["Llama-3.2-1B"][0] | common | {"max_position_embeddings": 131_072}
    scaling = {
        name: value for name, value in llama["rope_parameters"].items() if name != "rope_theta"
    }
    older = {name: value for name, value in llama.items() if name != "rope_parameters"}
    older |= {
        "rope_theta": 500_000.0,
        "rope_scaling": scaling,
        "mlp_bias": False,
        "pretraining_tp": 1,
    }
    assert shape_of(older, "") == shape_of(llama, "")


def test_parameters_are_stacked_by_layer_and_expert() -> None:
    config, _ = PUBLISHED["Qwen3-30B-A3B"]
    shape = shape_of(config | {"rms_norm_eps": 1, "max_position_embeddings": 1}, "")
    stacks = {parameter.stacked_by for parameter in parameters_of(shape)}
    assert stacks == {(), ("layer",), ("layer", "expert")}


@pytest.mark.parametrize(
    ("num_chosen", "message"),
    [
        (
            1,
            "num_experts_per_tok = 1: with norm_topk_prob the weight of a single expert is always 1",
        ),
        (0, "num_experts_per_tok = 0"),
        (129, "num_experts_per_tok = 129, but num_experts = 128"),
    ],
)
def test_a_router_that_megatron_does_not_build(num_chosen: int, message: str) -> None:
    config = {**QWEN3_235B, "num_experts_per_tok": num_chosen}
    with pytest.raises(CheckpointError, match=message):
        shape_of(config, "config.json")
