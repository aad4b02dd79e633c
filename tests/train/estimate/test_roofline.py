"""The least time of a step: operations are those of the MFU, and each ceiling holds by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from miles.architecture.config import ModelShape
from miles.architecture.sizes import embedding_parameters, matrix_parameters, total_parameters
from miles.train.estimate.flops import training_flops
from miles.train.estimate.roofline import Chip, Floor, StepWork, floor
from miles.train.parallel_layout import Layout

DENSE = ModelShape("qwen3", 4, 64, 160, 4, 2, 16, 512, 256, 1e6, 1e-6, True, True, False)
EXPERTS = replace(
    DENSE, model_type="qwen3_moe", num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=32
)
WORK = StepWork(num_tokens=100, num_micro_batches=3, pairs_per_token=50.5, trained_share=1.0)
NO_LIMIT = 1e40
COMPUTE = Chip("multiplies at 1", 1.0, 1.0, 1.0, NO_LIMIT, NO_LIMIT)
MEMORY = Chip("copies at 1", 1.0, NO_LIMIT, NO_LIMIT, 1.0, NO_LIMIT)
LINKS = Chip("sends at 1", 1.0, NO_LIMIT, NO_LIMIT, NO_LIMIT, 1.0)


def flops(found: Floor, name: str) -> float:
    (part,) = [part for part in found.parts if part.name == name]
    return part.flops


def test_operations_are_those_of_the_mfu() -> None:
    found = floor(DENSE, Layout(1), WORK, COMPUTE)
    assert found.num_tokens == 300
    assert found.model_flops == training_flops(DENSE, 300, 15150)

    matrices = ("projections of attention", "MLP", "output layer and loss")
    of_matrices = sum(flops(found, name) for name in matrices)
    assert of_matrices == 6 * matrix_parameters(DENSE) * 300
    # FlashAttention computes the scores again: 3.5 times the forward pass instead of 3.
    assert flops(found, "attention") * 3 / 3.5 + of_matrices == pytest.approx(found.model_flops)


def test_experts_have_the_operations_of_their_tokens() -> None:
    found = floor(EXPERTS, Layout(4, expert=4), WORK, COMPUTE)
    # The router is left out: one column for each expert.
    of_experts = EXPERTS.num_layers * 2 * 3 * 64 * 32
    assert flops(found, "experts") == 6 * of_experts * 300


def test_tokens_that_are_not_trained_spare_the_output_layer() -> None:
    half = floor(DENSE, Layout(1), replace(WORK, trained_share=0.5), COMPUTE)
    assert flops(half, "output layer and loss") == 6 * embedding_parameters(DENSE) * 150


def test_recomputation_adds_the_forward_pass_of_the_layers() -> None:
    found = floor(DENSE, Layout(1), replace(WORK, is_recomputed=True), COMPUTE)
    layers = matrix_parameters(DENSE) - embedding_parameters(DENSE)
    attention = flops(found, "attention") / 3.5
    assert flops(found, "layers computed again") == 2 * layers * 300 + attention
    assert found.model_flops == training_flops(DENSE, 300, 15150), "they do not count for the MFU"


def test_each_ceiling_holds_by_itself() -> None:
    by_compute = floor(DENSE, Layout(1), WORK, COMPUTE)
    assert by_compute.seconds == pytest.approx(sum(part.flops for part in by_compute.parts))
    by_memory = floor(DENSE, Layout(1), WORK, MEMORY)
    assert by_memory.seconds == pytest.approx(sum(part.num_bytes for part in by_memory.parts))

    both = replace(COMPUTE, copy_bytes=1.0)
    seconds = floor(DENSE, Layout(1), WORK, both).seconds
    assert max(by_compute.seconds, by_memory.seconds) <= seconds
    assert seconds <= by_compute.seconds + by_memory.seconds


def test_ranks_divide_the_optimizer_and_exchange_gradients() -> None:
    num_parameters = total_parameters(DENSE)
    alone = floor(DENSE, Layout(1), WORK, MEMORY)
    eight = floor(DENSE, Layout(8), WORK, MEMORY)
    assert alone.hidden.num_bytes == 0
    assert alone.parts[-1].num_bytes == num_parameters * (30 + 4 + 4)
    assert eight.parts[-1].num_bytes == num_parameters * (34 / 8 + 4)
    assert eight.hidden.num_bytes == pytest.approx(num_parameters * 6 * 7 / 8)


def test_tokens_travel_to_the_experts_of_other_ranks() -> None:
    found = floor(EXPERTS, Layout(4, expert=4), WORK, LINKS)
    # There and back, forward and backward; a quarter of the copies stays.
    of_layer = 4 * 100 * 2 * 64 * 2 * 3 / 4
    assert found.seconds == pytest.approx(of_layer * EXPERTS.num_layers * 3)
