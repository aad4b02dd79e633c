"""Kinds of Adam, offloaded or fused or plain: the same steps, and checkpoints that go both ways."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles.architecture.config import ModelShape
from miles.train.compute_config import AS_USUAL, ComputeConfig
from miles.train.estimate.memory import Training, estimate
from miles.train.optimizer_settings import OptimizerSettings
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from tests.support.ranks import SETTINGS, SHAPE, batch, run_ranks, start, trainer_settings

OFFLOADED = replace(SETTINGS, precision_aware=True, cpu_offload=True)
HALF = replace(OFFLOADED, offload_fraction=0.5, overlap_offload=True)
UNFUSED = replace(AS_USUAL, adam_fusion=False)
LAST_STEP = 4
EXPERTS = replace(
    SHAPE, model_type="qwen3_moe", num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=32
)


@dataclass(frozen=True)
class Run:
    """What is left of a training."""

    numbers: list[tuple[float, float, float]]
    """loss, gradient's norm and learning rate of each step"""
    weights: list[np.ndarray]
    """of this rank, at the end"""
    device_bytes: int
    """of the optimizer's state on the GPU"""
    host_bytes: int
    """of the optimizer's state in the machine's memory"""
    own_settings: dict[str, str]
    """of the optimizer's first group"""


def train(
    layout: Layout,
    rank: int,
    settings: OptimizerSettings,
    *,
    shape: ModelShape = SHAPE,
    compute: ComputeConfig = AS_USUAL,
    load: Path | None = None,
    model_only: bool = False,
    save: Path | None = None,
) -> Run:
    """Train to step 4, from the first step or from a checkpoint after two; save one there.

    Args:
        model_only: begin with the first step from the weights of the checkpoint.
    """
    from megatron.core import tensor_parallel

    from miles.common import checkpoint_folder
    from miles.train.rank import checkpoint_load, checkpoint_writer
    from miles.train.rank.trainer import Trainer

    torch.manual_seed(7)  # the same first weights in each run
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    plain = trainer_settings(shape, layout, precision=Precision.BF16)
    trainer = Trainer(replace(plain, optimizer=settings, compute=compute), rank)
    first = 0
    if load is not None:
        found = checkpoint_folder.find(str(load))
        assert found is not None
        checkpoint_load.load(trainer, found, model_only=model_only)
        first = 0 if model_only else 2

    numbers = []
    for step in range(first, LAST_STEP + 1):
        report, ranks = batch(step, layout)
        result = trainer.train_step(report, ranks[layout.data_rank(rank)])
        numbers.append((result.loss, result.grad_norm, result.lr))
        if step == 1 and save is not None:
            checkpoint_writer.save(trainer, str(save), 2, {"cursor": {"consumed_rows": 14}})
    weights = [weight.detach().float().numpy() for weight in trainer.gpt.parameters()]
    optimizer = trainer.optimizer
    return Run(numbers, weights, *state_bytes(optimizer), own_settings(optimizer))


def state_bytes(optimizer: Any) -> tuple[int, int]:
    """Return the bytes of the state of the offloading optimizer on the GPU and in the machine."""
    device_bytes = host_bytes = 0
    for part in optimizer.chained_optimizers:
        if not hasattr(part.optimizer, "cpu_optimizers"):
            continue
        if part.optimizer.gpu_optimizer:
            device_bytes += _bytes_of(part.optimizer.gpu_optimizer, with_gradients=False)
        for adam in part.optimizer.cpu_optimizers:
            host_bytes += _bytes_of(adam, with_gradients=True)
    return device_bytes, host_bytes


def _bytes_of(adam: Any, *, with_gradients: bool) -> int:
    """Return the bytes of the weights that an Adam steps, their moments and their gradients."""
    num_bytes = 0
    for group in adam.param_groups:
        for weight in group["params"]:
            state = adam.state[weight]
            tensors = [weight, state["exp_avg"], state["exp_avg_sq"]]
            tensors += [weight.grad] if with_gradients else []
            # A slice of a larger tensor would keep all of it.
            num_bytes += sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    return num_bytes


def own_settings(optimizer: Any) -> dict[str, str]:
    """Return what an Adam's groups of parameters say of the fields that this kind of Adam has."""
    adam = optimizer.chained_optimizers[0].optimizer
    return {name: repr(adam.param_groups[0].get(name)) for name in adam.defaults}


def all_runs(layout: Layout, rank: int, meeting: Path, folder: str) -> dict[str, Run]:
    """Train with and without offloading, and continue each checkpoint in each way."""
    start(layout, rank, meeting)
    plain, offloaded, unfused = (Path(folder, name) for name in ("plain", "offloaded", "unfused"))
    return {
        "plain": train(layout, rank, SETTINGS, save=plain),
        "offloaded": train(layout, rank, OFFLOADED, save=offloaded),
        "half": train(layout, rank, HALF),
        "offloaded again": train(layout, rank, OFFLOADED, load=offloaded),
        "half again": train(layout, rank, HALF, load=offloaded),
        "plain, then offloaded": train(layout, rank, OFFLOADED, load=plain),
        "offloaded, then plain": train(layout, rank, SETTINGS, load=offloaded),
        "unfused": train(layout, rank, SETTINGS, compute=UNFUSED, save=unfused),
        "unfused, then plain": train(layout, rank, SETTINGS, load=unfused),
        "plain, then unfused": train(layout, rank, SETTINGS, compute=UNFUSED, load=plain),
        "plain weights": train(layout, rank, SETTINGS, load=plain, model_only=True),
        "offloaded weights": train(layout, rank, OFFLOADED, load=plain, model_only=True),
    }


def expert_runs(layout: Layout, rank: int, meeting: Path, folder: str) -> dict[str, Run]:
    """Train experts that are spread, and continue: their optimizer is one of two."""
    start(layout, rank, meeting)
    save = Path(folder, "experts")
    return {
        "unbroken": train(layout, rank, OFFLOADED, shape=EXPERTS, save=save),
        "again": train(layout, rank, OFFLOADED, shape=EXPERTS, load=save),
        "plain": train(layout, rank, SETTINGS, shape=EXPERTS, load=save),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = str(tmp_path_factory.mktemp("offload"))
    runs: dict[str, Run] = run_ranks(all_runs, Layout(2), folder)[0]
    return runs


def assert_same(resumed: Run, unbroken: Run) -> None:
    assert resumed.numbers == unbroken.numbers[-len(resumed.numbers) :]
    for weight, other in zip(resumed.weights, unbroken.weights, strict=True):
        np.testing.assert_array_equal(weight, other)


@pytest.mark.slow
def test_offloading_changes_no_step(runs: dict[str, Run]) -> None:
    """Adam's fused kernel may round otherwise; which share is offloaded changes no bit."""
    np.testing.assert_allclose(runs["offloaded"].numbers, runs["plain"].numbers, rtol=1e-3)
    assert runs["plain"].host_bytes == 0 < runs["offloaded"].host_bytes, "the other optimizer ran"
    assert_same(runs["half"], runs["offloaded"])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["offloaded again", "half again"])
def test_an_offloaded_run_continues_bit_by_bit(runs: dict[str, Run], way: str) -> None:
    assert_same(runs[way], runs["offloaded"])
    unbroken = runs[way.removesuffix(" again")]
    assert runs[way].host_bytes == unbroken.host_bytes
    assert unbroken.own_settings.items() <= runs[way].own_settings.items()


@pytest.mark.slow
def test_a_checkpoint_continues_with_and_without_offloading(runs: dict[str, Run]) -> None:
    for way in ("plain, then offloaded", "offloaded, then plain"):
        np.testing.assert_allclose(runs[way].numbers, runs["plain"].numbers[2:], rtol=1e-3)


@pytest.mark.slow
def test_fusing_changes_no_step(runs: dict[str, Run]) -> None:
    np.testing.assert_allclose(runs["unfused"].numbers, runs["plain"].numbers, rtol=1e-3)


@pytest.mark.slow
def test_a_checkpoint_continues_with_and_without_fusing(runs: dict[str, Run]) -> None:
    """An older checkpoint says "not fused" in its groups, which must not count."""
    for way, fused in (("unfused, then plain", "True"), ("plain, then unfused", "None")):
        np.testing.assert_allclose(runs[way].numbers, runs["plain"].numbers[2:], rtol=1e-3)
        assert runs[way].own_settings["fused"] == fused


@pytest.mark.slow
def test_spread_experts_continue(tmp_path: Path) -> None:
    layout = Layout(2, expert=2)
    for experts in run_ranks(expert_runs, layout, str(tmp_path)):
        assert experts["unbroken"].host_bytes > 0
        assert_same(experts["again"], experts["unbroken"])
        np.testing.assert_allclose(
            experts["plain"].numbers, experts["unbroken"].numbers[2:], rtol=1e-3
        )


@pytest.mark.slow
def test_weights_to_begin_with_reach_the_machine(runs: dict[str, Run]) -> None:
    begun = runs["offloaded weights"]
    np.testing.assert_allclose(begun.numbers, runs["plain weights"].numbers, rtol=5e-3)
    assert begun.numbers[0] != runs["plain"].numbers[0], "they are not the random ones"


@pytest.mark.slow
def test_the_estimate_counts_what_is_offloaded(runs: dict[str, Run]) -> None:
    for name, settings in (("offloaded", OFFLOADED), ("half", HALF)):
        (stage,) = estimate(
            SHAPE,
            Layout(2),
            Training(precision=Precision.BF16, optimizer=settings),
            max_tokens_per_gpu=64,
        )
        # Rank 0 of two has a few parameters more. Whole parameters are offloaded, until their share
        # is reached; the first is the largest.
        largest = SHAPE.vocab_size * SHAPE.hidden_size * 16 // 2
        slack = 1024 if settings.offload_fraction == 1 else largest
        assert runs[name].host_bytes == pytest.approx(stage.host, abs=slack)
        assert runs[name].device_bytes == pytest.approx(stage.optimizer, abs=slack)
    assert runs["half"].device_bytes > 0 < runs["half"].host_bytes < runs["offloaded"].host_bytes
