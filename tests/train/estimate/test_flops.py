"""Operations of a step: counted by hand, by torch on transformers' models, and over samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from miles.architecture.adapter import AdapterShape
from miles.architecture.families import shape_of
from miles.architecture.sizes import key_size, matrix_parameters, query_size
from miles.train.estimate.flops import peak_flops, training_flops
from tests.support.models import EXPERTS, SIZES
from tests.support.shapes import HAND_COUNTED as DENSE

MOE = replace(
    DENSE, model_type="qwen3_moe", num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=6
)


def test_a_hand_count() -> None:
    # A layer: queries 8 x 8, keys and values 8 x 4 each, projection 8 x 8, MLP 3 x 8 x 16.
    # The output layer: 8 x 10.
    assert matrix_parameters(DENSE) == 2 * (64 + 32 + 32 + 64 + 384) + 80 == 1232

    # Two samples, of 3 and 2 tokens: 6 + 3 pairs. A pair costs 2 x 2 x 4 for each of 2 heads in
    # each of 2 layers.
    assert training_flops(DENSE, 5, 9) == 3 * (2 * 1232 * 5 + 64 * 9) == 38_688


def test_a_token_goes_through_its_experts_alone() -> None:
    # In place of the MLP: the router 8 x 4, and two experts of 3 x 8 x 6.
    assert matrix_parameters(MOE) == 2 * (64 + 32 + 32 + 64 + 32 + 288) + 80 == 1104


def test_packed_samples_cost_what_each_costs_alone() -> None:
    lengths = [7, 1, 30, 12]
    pairs = [length * (length + 1) // 2 for length in lengths]
    alone = sum(
        training_flops(DENSE, length, count) for length, count in zip(lengths, pairs, strict=True)
    )
    assert training_flops(DENSE, sum(lengths), sum(pairs)) == alone
    assert alone < training_flops(DENSE, 50, 50 * 51 // 2), "one long sample costs more"


@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_torch_counts_the_same_operations(model_type: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, vocab_size=192, attn_implementation="eager", **SIZES)
    model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(config.to_dict(), "there")
    tokens = 20
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long))
    counted = counter.get_total_flops()
    # Eager attention multiplies every pair, also those that the mask then hides.
    assert 3 * counted == training_flops(shape, tokens, tokens * tokens)


def test_torch_counts_the_same_of_an_adapter() -> None:
    """PEFT's model, forward and backward: no gradient of a frozen matrix is computed."""
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("qwen3", vocab_size=192, attn_implementation="eager", **SIZES)
    model = get_peft_model(
        AutoModelForCausalLM.from_config(config),
        LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"]),
    )
    shape = shape_of(config.to_dict(), "there")
    adapter = AdapterShape(4, 8.0, ("q_proj", "up_proj", "down_proj"))
    tokens = 20
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.long)).logits.sum().backward()

    # Nothing below the first adapter has a gradient: the embedding is frozen, too.
    num_queries, num_keys = query_size(shape), key_size(shape)
    first = 2 * tokens * shape.hidden_size * (num_queries + 2 * num_keys + adapter.rank)
    # Nor have the keys and values of the first layer: no gradient of the scores for them.
    first += 2 * num_queries * tokens * tokens * 2
    expected = training_flops(shape, tokens, tokens * tokens, adapter)
    assert counter.get_total_flops() == expected - first


def test_torch_counts_the_same_experts() -> None:
    """A token goes through the experts that it is sent to, and no others."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    config = AutoConfig.for_model("qwen3_moe", vocab_size=192, **SIZES, **EXPERTS, **options)
    model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(config.to_dict(), "there")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(20)[None])
    assert 3 * counter.get_total_flops() == training_flops(shape, 20, 400)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H800", 989),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA A10-8Q", None),
        ("Tesla V100-SXM2-32GB", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("Some other card", None),
    ],
)
def test_peak_of_a_gpu(name: str, tflops: float | None) -> None:
    assert peak_flops(name) == (None if tflops is None else pytest.approx(tflops * 1e12))
