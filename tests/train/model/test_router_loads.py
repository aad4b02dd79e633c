"""The loads of experts and the loss that balances them, by hand. `tests/train/rank` has real routers."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from miles.data.types import StepContent
from miles.train.model.router_loads import RouterLoads
from miles.train.parallel_layout import Layout
from tests.support.ranks import SHAPE

EXPERTS = replace(SHAPE, num_layers=2, num_experts=2, moe_router_topk=1, model_type="qwen3_moe")
"""Megatron routes to two at least; one is easier to follow."""
WITHOUT_LAYERS = SimpleNamespace(decoder=SimpleNamespace(layers=[]))
CONTENT = StepContent(
    num_samples=1,
    num_tokens=10,
    num_causal_pairs=0,
    num_trained_tokens=4,
    source_trained_tokens=(4,),
    num_straddling_tokens=0,
    fingerprint="",
)


def new_loads(coefficient: float) -> RouterLoads:
    return RouterLoads(WITHOUT_LAYERS, EXPERTS, Layout(1), coefficient)


def route(loads: RouterLoads, layer: int, num_first: int) -> None:
    """Send so many of a layer's ten tokens to the first expert, which is as likely for all."""
    chosen = torch.zeros(10, 2, dtype=torch.bool)
    chosen[:num_first, 0] = True
    chosen[num_first:, 1] = True
    with loads.counting():
        loads.add(layer, chosen)


def test_the_worst_layer_is_shown() -> None:
    loads = new_loads(0.0)
    loads.begin_step(CONTENT)
    route(loads, 0, 5)
    route(loads, 1, 8)
    stats = loads.finish_step(loads.sums, loads.sums, is_taken=True)
    assert stats.max_load == pytest.approx(1.6)
    assert stats.entropy == pytest.approx(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))
    assert stats.aux_loss is None

    loads.begin_step(CONTENT)
    route(loads, 0, 5)
    route(loads, 1, 10)
    collapsed = loads.finish_step(loads.sums, loads.sums, is_taken=True)
    assert (collapsed.max_load, collapsed.entropy) == (2.0, 0.0)


@pytest.mark.parametrize(("num_first", "share", "loss"), [(5, 0.5, 1.0), (10, 0.8, 1.6)])
def test_the_example_of_the_docstring(num_first: int, share: float, loss: float) -> None:
    loads = new_loads(0.5)
    loads.begin_step(CONTENT)
    logits = torch.tensor([share, 1 - share]).log().expand(10, 1, 2)
    for layer in range(2):
        route(loads, layer, num_first)
        with loads.counting(), torch.no_grad():
            loads.balanced(logits, 10)
    assert loads.finish_step(loads.sums, loads.sums, is_taken=True).aux_loss == pytest.approx(loss)


def test_a_skipped_step_leaves_what_is_balanced() -> None:
    loads = new_loads(0.5)
    assert loads.must_count_ahead
    for num_first, is_taken in ((9, True), (1, False)):
        loads.begin_step(CONTENT)
        route(loads, 0, num_first)
        route(loads, 1, num_first)
        loads.finish_step(loads.sums, loads.sums, is_taken=is_taken)
    assert loads.last_choices == [18, 2]
    assert not loads.must_count_ahead

    # 0.5 x 2 experts x (0.9, 0.1) x 4 trained tokens / 20 rows
    loads.begin_step(CONTENT)
    torch.testing.assert_close(loads._weights, torch.tensor([0.18, 0.02]))
    resumed = new_loads(0.5)
    resumed.continue_from([18, 2])
    resumed.begin_step(CONTENT)
    assert torch.equal(resumed._weights, loads._weights)
    assert not new_loads(0.0).must_count_ahead, "nothing is balanced"
