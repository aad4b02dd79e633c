"""Weight gradients are added to their float32 sum without being rounded on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from miles.train.compute_config import AS_USUAL
from miles.train.model import weight_gradients
from miles.train.parallel_layout import Layout
from tests.support.ranks import SHAPE, batch, start, trainer_settings

PLAIN = replace(AS_USUAL, grad_accumulation_fusion=False)


def products(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the inputs and output gradients of some micro-batches of a linear layer."""
    generator = torch.Generator().manual_seed(3)
    for tokens in (31, 64, 5):
        inputs = torch.randn(tokens, 24, generator=generator)
        yield inputs.to(dtype), torch.randn(tokens, 16, generator=generator).to(dtype)


def accumulated(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the float32 sum of the micro-batches' gradients, and the exact one in float64."""
    main_grad = torch.zeros(16, 24)
    exact = torch.zeros(16, 24, dtype=torch.float64)
    for inputs, grad_output in products(dtype):
        weight_gradients.accumulate(inputs, grad_output, main_grad)
        exact += grad_output.double().t() @ inputs.double()
    return main_grad, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_has_the_precision_of_float32(dtype: torch.dtype) -> None:
    main_grad, exact = accumulated(dtype)
    assert main_grad.dtype == torch.float32
    torch.testing.assert_close(main_grad.double(), exact, rtol=1e-5, atol=1e-5)


def test_no_tokens_add_nothing() -> None:
    main_grad = torch.ones(16, 24)
    weight_gradients.accumulate(torch.zeros(0, 24), torch.zeros(0, 16), main_grad)
    assert torch.equal(main_grad, torch.ones(16, 24))


@pytest.fixture(scope="module")
def _rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from miles.train.model import process_groups

    start(Layout(1), 0, tmp_path_factory.mktemp("ranks") / "meeting")
    yield
    process_groups.shutdown()


def make_trainer(compute: Any, weights: Any = None) -> Any:
    from miles.train.rank.trainer import Trainer

    trainer = Trainer(replace(trainer_settings(SHAPE, Layout(1)), compute=compute), 0)
    if weights is not None:
        trainer.gpt.load_state_dict(weights)
        trainer.copy_weights_to_optimizer()
    return trainer


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Megatron asks slices for theirs
@pytest.mark.usefixtures("_rank")
def test_a_tied_model_has_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding gets a part from the output layer's product and a part from its own look-up."""
    assert SHAPE.tied_embeddings
    num_products = 0
    accumulate = weight_gradients.accumulate

    def count(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        nonlocal num_products
        num_products += 1
        accumulate(inputs, grad_output, main_grad)

    monkeypatch.setattr(weight_gradients, "accumulate", count)
    report, (micro_batches,) = batch(0, Layout(1))
    plain = make_trainer(PLAIN)
    fused = make_trainer(AS_USUAL, plain.gpt.state_dict())

    wanted = plain.train_step(report, micro_batches)
    assert num_products == 0
    found = fused.train_step(report, micro_batches)
    num_linears = 4 * SHAPE.num_layers
    assert num_products >= num_linears * len(micro_batches)

    assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5)
    names = dict(plain.gpt.named_parameters())
    for name, parameter in fused.gpt.named_parameters():
        torch.testing.assert_close(
            parameter.main_grad, names[name].main_grad, rtol=1e-4, atol=1e-6, msg=name
        )
