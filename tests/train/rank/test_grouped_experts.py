"""Experts in grouped products train as one after another do, under the same names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles.data.types import MicroBatch, StepReport
from miles.train.compute_config import ComputeConfig
from miles.train.parallel_layout import Layout
from miles.train.recompute_config import KEEP_ALL, RecomputeConfig
from tests.support.ranks import SHAPE, batch, run_ranks, start, trainer_settings

EXPERTS = replace(
    SHAPE, model_type="qwen3_moe", num_experts=8, moe_router_topk=3, moe_ffn_hidden_size=32
)
FULL = RecomputeConfig("full", "uniform", 1)
NUM_STEPS = 3
FEW = (5,)
"""One sample a step: of two data ranks, one has a dummy micro-batch."""


@dataclass(frozen=True)
class Case:
    """A layout, and how the model is computed on it."""

    layout: Layout
    num_choices: int = 3
    """the experts of a token"""
    recompute: RecomputeConfig = KEEP_ALL
    is_overlapped: bool = False
    """sums and weights travel beside the computation, in buckets of a few experts"""

    def compute(self, is_grouped: bool) -> ComputeConfig:
        """Return the switches of a run."""
        return ComputeConfig(
            grouped_experts=is_grouped,
            overlap_grad_reduce=self.is_overlapped,
            overlap_param_gather=self.is_overlapped,
            ddp_bucket_size=20_000 if self.is_overlapped else None,
        )


CASES = {
    "DP 2, overlapped": Case(Layout(2), is_overlapped=True),
    "EP 2": Case(Layout(2, expert=2)),
    "EP 4, two experts a rank, full recomputation": Case(Layout(4, expert=4), recompute=FULL),
    "EP 2, one after the other by pipeline stage": Case(Layout(4, expert=2, pipeline=2)),
    "TP 2, experts too, sequence parallel": Case(
        Layout(2, tensor=2, sequence_parallel=True, expert_tensor=2)
    ),
    "EP 2 x TP 2, experts too, sequence parallel": Case(
        Layout(4, tensor=2, sequence_parallel=True, expert=2, expert_tensor=2)
    ),
}


@dataclass(frozen=True)
class Observed:
    """What a rank saw of a run."""

    numbers: list[tuple[float, float]]
    """loss and gradient norm of each step, then loss sums of an evaluation"""
    names: list[str]
    """of the parameters, of the checkpoint's tensors and their boxes"""
    computed_by: list[str]
    """what computes each layer's experts"""
    are_views: list[bool]
    """whether the experts' weights are used where they lie"""


def steps(layout: Layout, rank: int) -> list[tuple[StepReport, tuple[MicroBatch, ...]]]:
    """Return this rank's micro-batches: of many samples, and in the last step of one."""
    reports = [batch(step, layout) for step in range(NUM_STEPS - 1)]
    reports.append(batch(NUM_STEPS, layout, lengths=FEW))
    return [(report, parts[layout.data_rank(rank)]) for report, parts in reports]


def observe(layout: Layout, rank: int, case: Case, is_grouped: bool) -> Observed:
    """Train and evaluate from the weights of one seed, and look at the model."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from miles.train.rank.trainer import Trainer

    torch.manual_seed(7)
    model_parallel_cuda_manual_seed(7)
    shape = replace(EXPERTS, moe_router_topk=case.num_choices)
    settings = trainer_settings(shape, layout, recompute=case.recompute)
    settings = replace(settings, compute=case.compute(is_grouped))
    trainer = Trainer(settings, rank)
    if case.is_overlapped:
        assert len(trainer.model.bucket_groups) > 4
    data = steps(layout, rank)
    results = [trainer.train_step(report, micro_batches) for report, micro_batches in data]
    sums = trainer.evaluate([micro_batches for _, micro_batches in data], settings.num_sources)

    experts = [layer.mlp.experts for layer in trainer.gpt.decoder.layers]
    owners = [each.forward.__self__ for each in experts]
    weights = [each._gate_and_up for each in owners] if is_grouped else []
    return Observed(
        numbers=[*((each.loss, each.grad_norm) for each in results), tuple(sums.losses)],
        names=names_of(trainer),
        computed_by=[type(owner).__name__ for owner in owners],
        are_views=[each.stacked().data_ptr() == each.parameters[0].data_ptr() for each in weights],
    )


def names_of(trainer: Any) -> list[str]:
    """Return the parameters' names, and key, shape and place of all that a checkpoint holds."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    state = trainer.gpt.sharded_state_dict()
    apply_factories(state)
    tensors = [each for each in nested_values(state) if hasattr(each, "global_offset")]
    boxes = [f"{each.key} {each.global_shape} {each.global_offset}" for each in tensors]
    return [name for name, _ in trainer.gpt.named_parameters()] + boxes


def compare(layout: Layout, rank: int, meeting: Path, case: Case) -> tuple[Observed, Observed]:
    """Return what is observed with the experts one after another, and in groups."""
    start(layout, rank, meeting)
    plain = observe(layout, rank, case, is_grouped=False)
    return plain, observe(layout, rank, case, is_grouped=True)


@pytest.mark.parametrize("name", CASES)
def test_grouped_experts_train_alike(name: str) -> None:
    for plain, grouped in run_ranks(compare, CASES[name].layout, CASES[name]):
        assert set(plain.computed_by) == {"SequentialMLP"}
        assert set(grouped.computed_by) == {"GroupedExperts"}
        # The edge of a bucket, with padding, lies between two experts of a layer.
        assert all(grouped.are_views) is not CASES[name].is_overlapped
        assert grouped.names == plain.names
        np.testing.assert_allclose(grouped.numbers, plain.numbers, rtol=2e-5)
