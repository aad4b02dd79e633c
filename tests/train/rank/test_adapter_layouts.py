"""Adapters train alike on any layout: the same losses, norms and tensors, whatever is dropped."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from miles.train.compute_config import ComputeConfig
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.recompute_config import RecomputeConfig
from tests.support.adapted_ranks import ADAPTER, EXPERTS, ON_ATTENTION, Case, Trained, run
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

NUM_STEPS = 4
FULL = RecomputeConfig("full", "uniform", 1)
OVERLAPPED = ComputeConfig(
    overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=1_000
)
GROUPED = ComputeConfig(grouped_experts=True)
DROPOUT = Case(dropout=0.3)
SOME = Case(replace(ADAPTER, targets=("q_proj", "v_proj", "up_proj", "down_proj")))
MOE = Case(ON_ATTENTION, dropout=0.3, shape=EXPERTS)
BF16 = Case(precision=Precision.BF16)

TP = Layout(2, tensor=2)
SP = Layout(2, tensor=2, sequence_parallel=True)
PP = Layout(2, pipeline=2)


@functools.cache
def on_one_rank(case: Case) -> Trained:
    """Return what one rank makes of a case."""
    (trained,) = run_ranks(run, Layout(1), case, NUM_STEPS)
    assert trained.numbers[NUM_STEPS - 1][0] < trained.numbers[0][0], "nothing was learnt"
    return trained


@pytest.mark.parametrize(
    ("case", "layout", "rtol", "changes"),
    [
        pytest.param(DROPOUT, TP, 2e-5, {}, id="TP 2"),
        pytest.param(DROPOUT, SP, 2e-5, {"recompute": FULL}, id="TP 2, SP, recomputed"),
        pytest.param(DROPOUT, PP, 2e-5, {"recompute": FULL}, id="PP 2, recomputed"),
        pytest.param(DROPOUT, Layout(2), 2e-5, {"compute": OVERLAPPED}, id="DP 2, overlapped"),
        pytest.param(SOME, SP, 2e-5, {}, id="some projections, TP 2, SP"),
        pytest.param(MOE, Layout(2, expert=2), 2e-5, {"compute": GROUPED}, id="experts, EP 2"),
        pytest.param(BF16, Layout(2), 2e-2, {"compute": OVERLAPPED}, id="bfloat16, DP 2"),
    ],
)
def test_layouts_train_the_same_adapters(
    case: Case, layout: Layout, rtol: float, changes: dict[str, object]
) -> None:
    whole = on_one_rank(case)
    ranks = run_ranks(run, layout, replace(case, **changes), NUM_STEPS)  # type: ignore[arg-type]
    for trained in ranks:
        assert trained.boxes
        trained.require_close(whole, rtol, atol=1e-3 if rtol < 1e-3 else 2e-2)


def test_something_is_dropped() -> None:
    plain = on_one_rank(Case())
    dropped = on_one_rank(DROPOUT)
    assert plain.numbers[0][0] == dropped.numbers[0][0], "B is 0 at the first step"
    assert plain.numbers[0][1] != dropped.numbers[0][1]
    assert plain.numbers[2][0] != dropped.numbers[2][0]
