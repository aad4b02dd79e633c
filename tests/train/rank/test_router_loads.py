"""The loss that balances experts, and how they are loaded: as transformers has it, on any layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles.architecture.families import read_shape
from miles.common import checkpoint_folder
from miles.common.checkpoint_folder import SavedCheckpoint
from miles.data.types import MicroBatch
from miles.train.compute_config import ComputeConfig
from miles.train.config import KEEP_ALL, RecomputeConfig
from miles.train.parallel_layout import Layout
from miles.train.types import StepResult
from tests.support.models import make_hf
from tests.support.ranks import SETTINGS, SHAPE, batch, run_ranks, start, trainer_settings

COEFFICIENT = 3.0
FIRST, SECOND, FEW = 0, 1, 2
"""Steps of the data; the learning rate of the first is 0. The last has one sample of five tokens: of
two data ranks one has a dummy."""
LENGTHS = (40, 3, 25, 9, 31, 17, 3)
"""Of the samples: they fill three micro-batches, of which one is padded at TP 2."""
STEPS = [FIRST, FIRST, SECOND, FEW]
ALONE = Layout(1)
FULL = RecomputeConfig("full", "uniform", 1)


@dataclass(frozen=True)
class Case:
    """A layout, and how the model is computed on it."""

    layout: Layout = ALONE
    max_tokens: int = 64
    recompute: RecomputeConfig = KEEP_ALL


ONE_RANK = Case()
CASES = {
    "one micro-batch": Case(max_tokens=1000),
    "full recomputation by blocks": Case(recompute=RecomputeConfig("full", "block", 2)),
    "DP 2": Case(Layout(2), max_tokens=1000),
    "PP 2, full recomputation": Case(Layout(2, pipeline=2), recompute=FULL),
    "TP 2 x EP 2, experts too, sequence parallel": Case(
        Layout(4, tensor=2, sequence_parallel=True, expert=2, expert_tensor=2)
    ),
}


@dataclass(frozen=True)
class Observed:
    """What a rank saw of a run."""

    results: list[StepResult]
    gradients: dict[int, np.ndarray]
    """by layer: of its router in the last step, before it is clipped"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(
        tmp_path_factory.mktemp("hf"), "qwen3_moe", tied=False, vocab_size=SHAPE.vocab_size
    )


def train(
    layout: Layout, rank: int, meeting: Path, folder: Path, case: Case, steps: list[int]
) -> Observed:
    """Train on some steps of the data."""
    start(layout, rank, meeting)
    trainer = new_trainer(layout, rank, folder, case.recompute)
    results = [train_on(trainer, step, case.max_tokens) for step in steps]
    gradients = {
        layer.layer_number - 1: layer.mlp.router.weight.main_grad.numpy().copy()
        for layer in trainer.gpt.decoder.layers
    }
    return Observed(results, gradients)


def new_trainer(
    layout: Layout, rank: int, folder: Path, recompute: RecomputeConfig = KEEP_ALL
) -> Any:
    """Return a trainer that balances, with the weights of a Hugging Face folder."""
    from miles.train.rank import checkpoint_load
    from miles.train.rank.trainer import Trainer

    settings = trainer_settings(read_shape(str(folder)), layout, recompute=recompute)
    optimizer = replace(SETTINGS, moe_aux_loss_coeff=COEFFICIENT, clip_grad=0.0)
    compute = ComputeConfig(grouped_experts=True)
    trainer = Trainer(replace(settings, optimizer=optimizer, compute=compute), rank)
    weights = SavedCheckpoint(str(folder), 0, None, is_hugging_face=True)
    checkpoint_load.load(trainer, weights, model_only=True)
    return trainer


def train_on(trainer: Any, step: int, max_tokens: int = 64) -> StepResult:
    """Train on a step of the data; what is evaluated in between counts for nothing."""
    lengths = (5,) if step == FEW else LENGTHS
    report, shards = batch(step, trainer.layout, lengths, max_tokens)
    micro_batches = shards[trainer.layout.data_rank(trainer.rank)]
    result: StepResult = trainer.train_step(report, micro_batches)
    trainer.evaluate([micro_batches], trainer.settings.num_sources)
    return result


@dataclass(frozen=True)
class Expected:
    """What transformers makes of the first step of the data."""

    loss: float
    """with the balancing loss, times its coefficient"""
    aux_loss: float
    gradients: list[np.ndarray]
    """of each layer's router"""
    grad_norm: float
    counts: np.ndarray
    """choices [layers, experts]"""


@pytest.fixture(scope="module")
def expected(folder: Path) -> Expected:
    """The model of transformers on the samples of the first step, each a row of one batch."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_router_logits=True, router_aux_loss_coef=COEFFICIENT
    )
    rows = rows_of(batch(FIRST, ALONE, LENGTHS, 1000)[1][0][0])
    out = model(**rows)
    out.loss.backward()

    layers = model.model.layers
    counts = np.zeros((len(layers), model.config.num_experts))
    is_token = rows["attention_mask"].flatten() > 0
    for layer, logits in enumerate(out.router_logits):
        chosen = logits[is_token].topk(model.config.num_experts_per_tok).indices
        counts[layer] = np.bincount(chosen.flatten(), minlength=model.config.num_experts)
    return Expected(
        loss=out.loss.item(),
        aux_loss=out.aux_loss.item(),
        gradients=[layer.mlp.gate.weight.grad.numpy() for layer in layers],
        grad_norm=float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])),
        counts=counts,
    )


def rows_of(samples: MicroBatch) -> dict[str, torch.Tensor]:
    """Return packed samples as rows with padding, as transformers takes them."""
    longest = int(np.diff(samples.cu_seqlens).max())
    num_rows = len(samples.row_ids)
    ids = torch.zeros(num_rows, longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row in range(num_rows):
        part = slice(samples.cu_seqlens[row], samples.cu_seqlens[row + 1])
        length = part.stop - part.start
        ids[row, :length] = torch.from_numpy(samples.input_ids[part])
        mask[row, :length] = 1
        (trained,) = np.nonzero(samples.loss_mask[part])
        labels[row, trained + 1] = torch.from_numpy(samples.labels[part][trained])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def total_loss(result: StepResult) -> float:
    """Return the loss as transformers has it, with the balancing loss."""
    assert result.router is not None
    assert result.router.aux_loss is not None
    return result.loss + COEFFICIENT * result.router.aux_loss


@pytest.fixture(scope="module")
def on_one_rank(folder: Path) -> Observed:
    (observed,) = run_ranks(train, ONE_RANK.layout, folder, ONE_RANK, STEPS[:2])
    return observed


def test_balancing_is_that_of_transformers(expected: Expected, on_one_rank: Observed) -> None:
    """The first step counts ahead; the second has its data and weights, and so its choices."""
    for result in on_one_rank.results:
        assert result.router is not None
        assert result.router.aux_loss == pytest.approx(expected.aux_loss, rel=1e-6)
        assert total_loss(result) == pytest.approx(expected.loss, rel=1e-6)
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)

    for layer, gradient in enumerate(expected.gradients):
        largest = np.abs(gradient).max()
        np.testing.assert_allclose(on_one_rank.gradients[layer], gradient, atol=1e-5 * largest)


def test_loads_are_those_of_transformers(expected: Expected, on_one_rank: Observed) -> None:
    shares = expected.counts / expected.counts.sum(1, keepdims=True)
    found = on_one_rank.results[0].router
    assert found is not None
    assert found.max_load == pytest.approx(shares.max() / shares.mean())
    assert found.entropy == pytest.approx((-shares * np.log(shares)).sum(1).min())


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[StepResult]:
    (observed,) = run_ranks(train, ONE_RANK.layout, folder, ONE_RANK, STEPS)
    return observed.results


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_balancing_is_the_same_on_any_layout(
    folder: Path, reference: list[StepResult], name: str
) -> None:
    case = CASES[name]
    for observed in run_ranks(train, case.layout, folder, case, STEPS):
        for found, other in zip(observed.results, reference, strict=True):
            assert (found.router, other.router) != (None, None)
            assert found.router.max_load == other.router.max_load
            assert found.router.entropy == other.router.entropy
            assert found.router.aux_loss == pytest.approx(other.router.aux_loss, rel=2e-5)
            assert found.loss == pytest.approx(other.loss, rel=2e-5)
            assert found.grad_norm == pytest.approx(other.grad_norm, rel=2e-5)


def save_and_continue(
    layout: Layout, rank: int, meeting: Path, folder: Path, save: str
) -> list[list[float]]:
    """Return the third step's gradient norm: unbroken, resumed, and resumed without the choices."""
    from miles.train.rank import checkpoint_load, checkpoint_writer

    start(layout, rank, meeting)
    trainer = new_trainer(layout, rank, folder)
    for step in STEPS[:2]:
        train_on(trainer, step)
    checkpoint_writer.save(trainer, save, 2, {"cursor": {}})
    norms = [train_on(trainer, SECOND).grad_norm]

    found = checkpoint_folder.find(save)
    assert found is not None
    assert found.extra is not None
    older = {"cursor": found.extra["cursor"]}
    for checkpoint in (found, replace(found, extra=older)):
        trainer = new_trainer(layout, rank, folder)
        checkpoint_load.load(trainer, checkpoint, model_only=False)
        norms.append(train_on(trainer, SECOND).grad_norm)
    return norms


def test_balancing_resumes_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    ((unbroken, resumed, without),) = run_ranks(
        save_and_continue, ONE_RANK.layout, folder, str(tmp_path)
    )
    assert resumed == unbroken
    # One of an older version continues, too: it counts ahead, other choices than those before it.
    assert without != pytest.approx(unbroken, rel=1e-3)
