"""Float16: the loss is scaled, a gradient that does not fit is skipped, the scale is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.types import StepResult
from tests.support.ranks import SHAPE, batch, run_ranks, start, trainer_settings

LAYOUT = Layout(2, pipeline=2)
TOO_HIGH = "the scaled gradient does not fit float16; the loss scale falls"
LARGE_SCALE = 2.0**16


def new_trainer(rank: int, precision: Precision) -> Any:
    """Return a trainer; those of one rank begin with the same weights."""
    from megatron.core import tensor_parallel

    from miles.train.rank.trainer import Trainer

    torch.manual_seed(7)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    return Trainer(trainer_settings(SHAPE, LAYOUT, precision=precision), rank)


def scaler_of(trainer: Any) -> Any:
    return trainer.optimizer.chained_optimizers[0].grad_scaler


def train(trainer: Any, rank: int, first: int, end: int) -> list[StepResult]:
    results = []
    for step in range(first, end):
        report, ranks = batch(step, LAYOUT)
        results.append(trainer.train_step(report, ranks[LAYOUT.data_rank(rank)]))
    return results


def numbers(results: list[StepResult]) -> list[tuple[float, float, float]]:
    return [(result.loss, result.grad_norm, result.lr) for result in results]


def weights_of(trainer: Any) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in trainer.gpt.parameters()]


def are_equal(weights: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, weights, others))


def with_a_fitting_scale(rank: int) -> dict[str, Any]:
    """Train in float32, and in float16 with the scale of a new run, at which the gradient fits."""
    whole = new_trainer(rank, Precision.FP32)
    half = new_trainer(rank, Precision.FP16)
    return {
        "float32": numbers(train(whole, rank, 0, 5)),
        "float16": numbers(train(half, rank, 0, 5)),
        "dtypes": {weight.dtype for weight in half.gpt.parameters()},
    }


def with_a_falling_scale(rank: int, folder: str) -> dict[str, Any]:
    """Train from a scale that is too large, save after three steps, and continue from there."""
    from miles.common import checkpoint_folder
    from miles.train.rank import checkpoint_load, checkpoint_writer

    trainer = new_trainer(rank, Precision.FP16)
    scaler_of(trainer)._scale.fill_(LARGE_SCALE)
    before = weights_of(trainer)
    steps = train(trainer, rank, 0, 3)
    is_unchanged = are_equal(before, weights_of(trainer))
    checkpoint_writer.save(trainer, folder, 3, {"cursor": {"consumed_rows": 21}})
    scale = float(scaler_of(trainer).scale)
    states = trainer.optimizer.chained_optimizers[0].optimizer.state.values()
    counts = {float(state["step"]) for state in states}
    later = train(trainer, rank, 3, 7)

    resumed = new_trainer(rank, Precision.FP16)
    found = checkpoint_folder.find(folder)
    assert found is not None
    checkpoint_load.load(resumed, found, model_only=False)
    resumed_scale = float(scaler_of(resumed).scale)
    again = train(resumed, rank, 3, 7)
    return {
        "skips": [result.skip for result in steps],
        "is_unchanged": is_unchanged,
        "counts": counts,
        "scales": (scale, resumed_scale, float(scaler_of(trainer).scale)),
        "later": numbers(later),
        "again": numbers(again),
        "reasons": [result.skip and str(result.skip.reason) for result in later],
        "is_same": are_equal(weights_of(trainer), weights_of(resumed)),
    }


def at_the_smallest_scale(rank: int) -> Any:
    """Return how a step is skipped whose gradient is not finite, when the scale cannot fall."""
    trainer = new_trainer(rank, Precision.FP16)
    scaler = scaler_of(trainer)
    scaler._scale.copy_(scaler.min_scale)
    first = next(iter(trainer.gpt.parameters()))
    first.register_hook(lambda gradient: gradient * float("inf"))
    (result,) = train(trainer, rank, 0, 1)
    return result.skip


def all_runs(layout: Layout, rank: int, meeting: Path, folder: str) -> dict[str, Any]:
    start(layout, rank, meeting)
    return {
        "fitting": with_a_fitting_scale(rank),
        "falling": with_a_falling_scale(rank, folder),
        "smallest": at_the_smallest_scale(rank),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("float16") / "save")
    runs: dict[str, Any] = run_ranks(all_runs, LAYOUT, folder)[-1]
    return runs


@pytest.mark.slow
def test_the_scale_leaves_the_numbers(runs: dict[str, Any]) -> None:
    fitting = runs["fitting"]
    assert fitting["dtypes"] == {torch.float16}
    np.testing.assert_allclose(fitting["float16"], fitting["float32"], rtol=5e-3)
    assert fitting["float16"] != fitting["float32"]


@pytest.mark.slow
def test_the_scale_falls_until_the_gradient_fits(runs: dict[str, Any]) -> None:
    falling = runs["falling"]
    assert [str(skip.reason) for skip in falling["skips"]] == [TOO_HIGH] * 3
    assert all(skip.row_ids == () for skip in falling["skips"]), "it says nothing about rows"
    assert falling["is_unchanged"]
    assert falling["counts"] == {0.0}, "saving takes no step that counts"
    assert falling["scales"][0] == LARGE_SCALE / 4, "the second overflow is the first to halve it"
    assert falling["reasons"][-1] is None
    assert np.isfinite(falling["later"][-1]).all()


@pytest.mark.slow
def test_the_scale_is_part_of_a_checkpoint(runs: dict[str, Any]) -> None:
    falling = runs["falling"]
    saved, resumed, last = falling["scales"]
    assert saved == resumed > last, "it goes on falling"
    assert falling["again"] == falling["later"]
    assert falling["is_same"]


@pytest.mark.slow
def test_a_scale_that_cannot_fall_is_no_excuse(runs: dict[str, Any]) -> None:
    assert runs["smallest"].reason == "the gradient is not finite"
    assert runs["smallest"].row_ids
