"""Adapters on one rank: they alone are trained, and untrained they change no bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from miles.architecture.adapter import adapter_parameters
from miles.train.parallel_layout import Layout
from miles.train.recompute_config import RecomputeConfig
from tests.support.adapted_ranks import ADAPTER, PROMPT, Case, boxes, evaluate, new_trainer, train
from tests.support.ranks import SHAPE, start

LORA = Case()
BASE = Case(adapter=None)
FULL = RecomputeConfig("full", "uniform", 1)


@pytest.fixture(scope="module", autouse=True)
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from miles.train.model import process_groups

    start(Layout(1), 0, tmp_path_factory.mktemp("ranks") / "meeting")
    yield
    process_groups.shutdown()


def test_an_untrained_adapter_changes_no_bit() -> None:
    base = new_trainer(BASE)
    adapted = new_trainer(LORA)
    np.testing.assert_array_equal(base.logits(PROMPT), adapted.logits(PROMPT))
    assert evaluate(base) == evaluate(adapted)
    assert base.generate([PROMPT], [], 4) == adapted.generate([PROMPT], [], 4)


def test_only_adapters_are_trained() -> None:
    trainer = new_trainer(LORA)
    frozen = boxes(trainer, of_adapters=False)
    trained = boxes(trainer, of_adapters=True)
    base = [box.data.clone() for box in frozen]
    adapter = [box.data.clone() for box in trained]
    logits = trainer.logits(PROMPT)
    loss = evaluate(trainer)
    answer = trainer.generate([PROMPT], [], 8)

    numbers = train(trainer, range(10))

    for box, before in zip(frozen, base, strict=True):
        assert torch.equal(box.data, before), box.key
    for box, before in zip(trained, adapter, strict=True):
        assert not torch.equal(box.data, before), box.key
    assert numbers[-1][0] < numbers[0][0]
    assert np.abs(trainer.logits(PROMPT) - logits).max() > 0.1
    assert evaluate(trainer) != loss
    assert trainer.generate([PROMPT], [], 8) != answer


def test_the_optimizer_and_the_gradients_are_of_adapters() -> None:
    trainer = new_trainer(LORA)
    train(trainer, range(1))
    num_values = sum(box.data.numel() for box in boxes(trainer, of_adapters=True))

    (part,) = trainer.optimizer.chained_optimizers
    state = part.optimizer.state
    assert sum(values["exp_avg"].numel() for values in state.values()) == num_values
    assert sum(buffer.numel for buffer in trainer.model.buffers) < num_values + 128
    for name, weight in trainer.gpt.named_parameters():
        assert weight.requires_grad == (".adapter." in name), name
        assert hasattr(weight, "main_grad") == weight.requires_grad, name
        assert weight.grad is None, name


def test_a_checkpoint_has_the_keys_of_the_parameter_map() -> None:
    state = new_trainer(LORA).gpt.sharded_state_dict()
    tensors = [tensor for name, tensor in state.items() if ".adapter." in name]
    shapes = {tensor.key: tensor.global_shape for tensor in tensors}
    for parameter in adapter_parameters(SHAPE, ADAPTER):
        expected = (*parameter.stack(SHAPE), *parameter.shape)
        assert shapes.pop(parameter.megatron) == expected
    assert not shapes


def test_nothing_is_dropped_in_evaluation() -> None:
    plain = new_trainer(LORA)
    dropping = new_trainer(Case(dropout=0.5))
    for trainer in (plain, dropping):
        for box in boxes(trainer, of_adapters=True):
            box.data.fill_(0.03)
    assert evaluate(plain) == evaluate(dropping)
    np.testing.assert_array_equal(plain.logits(PROMPT), dropping.logits(PROMPT))
    assert train(plain, range(1)) != train(dropping, range(1))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_layers_train_the_same_adapters(dropout: float) -> None:
    kept = new_trainer(Case(dropout=dropout))
    recomputed = new_trainer(Case(dropout=dropout, recompute=FULL))
    assert train(kept, range(3)) == train(recomputed, range(3))
    pairs = zip(*(boxes(each, of_adapters=True) for each in (kept, recomputed)), strict=True)
    for own, other in pairs:
        assert torch.equal(own.data, other.data), own.key
