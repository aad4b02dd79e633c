"""Adapters on one rank: they alone are trained, and without training they change no bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from miles.architecture.adapter import TARGETS, AdapterShape, adapter_parameters
from miles.train.parallel_layout import Layout
from miles.train.recompute_config import RecomputeConfig
from miles.train.types import AdapterSettings
from tests.support.ranks import NUM_SOURCES, SHAPE, batch, start, trainer_settings

ONE = Layout(1)
ALL = AdapterSettings(AdapterShape(4, 8.0, TARGETS), dropout=0.0, seed=3)
PROMPT = [1, 2, 3, 250, 7]
FULL = RecomputeConfig("full", "uniform", 1)


@pytest.fixture(scope="module", autouse=True)
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from miles.train.model import process_groups

    start(ONE, 0, tmp_path_factory.mktemp("ranks") / "meeting")
    yield
    process_groups.shutdown()


def new_trainer(lora: AdapterSettings | None, **settings: Any) -> Any:
    """Return a trainer with the same base weights each time."""
    from megatron.core import tensor_parallel

    from miles.train.rank.trainer import Trainer

    torch.manual_seed(7)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    return Trainer(trainer_settings(SHAPE, ONE, lora=lora, **settings), 0)


def train(trainer: Any, num_steps: int) -> list[float]:
    """Train some steps; return their losses."""
    losses = []
    for step in range(num_steps):
        report, (micro_batches,) = batch(step, ONE)
        result = trainer.train_step(report, micro_batches)
        assert result.skip is None
        losses.append(result.loss)
    return losses


def evaluate(trainer: Any) -> float:
    sums = trainer.evaluate([batch(50, ONE)[1][0]], NUM_SOURCES)
    return sum(sums.losses) / sum(sums.tokens)


def weights(trainer: Any, *, of_adapters: bool) -> dict[str, torch.Tensor]:
    from miles.train.model.adapters import is_adapter

    return {
        name: weight.detach().clone()
        for name, weight in trainer.gpt.named_parameters()
        if is_adapter(name) == of_adapters
    }


def test_an_untrained_adapter_changes_no_bit() -> None:
    base, adapted = new_trainer(None), new_trainer(ALL)
    np.testing.assert_array_equal(base.logits(PROMPT), adapted.logits(PROMPT))
    assert evaluate(base) == evaluate(adapted)
    assert base.generate([PROMPT], [], 4) == adapted.generate([PROMPT], [], 4)


def test_only_adapters_are_trained() -> None:
    trainer = new_trainer(ALL)
    base, adapter = weights(trainer, of_adapters=False), weights(trainer, of_adapters=True)
    before = trainer.logits(PROMPT), evaluate(trainer)

    losses = train(trainer, 10)

    for name, weight in weights(trainer, of_adapters=False).items():
        assert torch.equal(weight, base[name]), name
    for name, weight in weights(trainer, of_adapters=True).items():
        assert not torch.equal(weight, adapter[name]), name
    assert losses[-1] < losses[0]
    assert np.abs(trainer.logits(PROMPT) - before[0]).max() > 0.1
    assert evaluate(trainer) != before[1]


def test_the_optimizer_and_the_gradients_are_of_adapters() -> None:
    trainer = new_trainer(ALL)
    train(trainer, 1)
    num_values = sum(weight.numel() for weight in weights(trainer, of_adapters=True).values())

    (part,) = trainer.optimizer.chained_optimizers
    state = part.optimizer.state
    assert sum(values["exp_avg"].numel() for values in state.values()) == num_values
    assert sum(buffer.numel for buffer in trainer.model.buffers) < num_values + 128
    for name, weight in trainer.gpt.named_parameters():
        assert weight.requires_grad == (".adapter." in name), name
        assert hasattr(weight, "main_grad") == weight.requires_grad, name
        assert weight.grad is None, name


def test_recomputed_layers_train_the_same_adapters() -> None:
    kept, recomputed = new_trainer(ALL), new_trainer(ALL, recompute=FULL)
    assert train(kept, 3) == train(recomputed, 3)
    for name, weight in weights(kept, of_adapters=True).items():
        assert torch.equal(weight, dict(recomputed.gpt.named_parameters())[name]), name


def test_a_checkpoint_has_the_keys_of_the_parameter_map() -> None:
    trainer = new_trainer(ALL)
    state = trainer.gpt.sharded_state_dict()
    tensors = [tensor for name, tensor in state.items() if ".adapter." in name]
    shapes = {tensor.key: tensor.global_shape for tensor in tensors}
    for parameter in adapter_parameters(SHAPE, ALL.adapter):
        expected = (*parameter.stack(SHAPE), *parameter.shape)
        assert shapes.pop(parameter.megatron) == expected
    assert not shapes
