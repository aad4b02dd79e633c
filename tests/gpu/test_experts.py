"""Experts on a GPU in bfloat16: grouped products, SwiGLU and the tokens' way, without a wait."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from miles.train.model import device
from miles.train.model.grouped_product import GroupedWeights, grouped_linear
from miles.train.model.kernels import has_fused_kernels
from miles.train.model.permutation import route, sort_chunks
from miles.train.model.weighted_swiglu import weighted_swiglu

HIDDEN, SIZE, EXPERTS, CHOICES, TOKENS = 64, 32, 6, 2, 150
BOUND = 1e-2
"""Of the difference's norm to the reference's: a few roundings to bfloat16."""


@pytest.fixture(autouse=True)
def seed() -> None:
    if device.has_gpu() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("before Hopper, experts are not grouped")
    torch.manual_seed(1)


@contextmanager
def no_wait() -> Iterator[None]:
    """Fail where the host waits for the GPU."""
    if not device.has_gpu():
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def draw(*shape: int) -> Tensor:
    """Return random numbers, bfloat16, on the device, of which a gradient is wanted."""
    values = torch.randn(*shape) / math.sqrt(shape[-1])
    return values.to(device.torch_device(), torch.bfloat16).requires_grad_()


def distance(found: Tensor | None, expected: Tensor | None) -> float:
    """Return the difference's norm to the reference's; NaN where a number is none."""
    assert found is not None
    assert expected is not None
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def choose() -> Tensor:
    """Return unevenly chosen experts, bool [TOKENS, EXPERTS]: the third by no token."""
    scores = torch.rand(TOKENS, EXPERTS) * torch.tensor([1.0, 0.5, 0.0, 0.9, 0.3, 0.7])
    chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    chosen.scatter_(1, scores.topk(CHOICES).indices, True)
    return chosen.to(device.torch_device())


def weights_in_a_buffer() -> list[torch.nn.Parameter]:
    """Return a matrix for each expert, with a sum of gradients, as Megatron lays them out."""
    place = device.torch_device()
    numel = HIDDEN * SIZE
    values = draw(EXPERTS * (numel + 64)).detach()
    sums = torch.zeros(len(values), device=place)

    parameters = []
    for expert in range(EXPERTS):
        start = (EXPERTS - 1 - expert) * (numel + 64)
        parameter = torch.nn.Parameter(values[start : start + numel].view(SIZE, HIDDEN))
        parameter.main_grad = sums[start : start + numel].view(SIZE, HIDDEN)
        parameters.append(parameter)
    return parameters


def test_products_and_permutation_are_one_experts_after_another() -> None:
    chosen, tokens, matrices = choose(), draw(TOKENS, HIDDEN), weights_in_a_buffer()
    probs = torch.rand(TOKENS, EXPERTS, device=tokens.device, requires_grad=True)
    weights, grad = GroupedWeights(matrices), draw(TOKENS, SIZE // 2).detach()
    has_fused_kernels(tokens)  # the first question runs one, and waits

    for _ in range(2):  # the second time in memory that is not zero
        tokens.grad = probs.grad = None
        for matrix in matrices:
            matrix.main_grad.zero_()
        torch.full((EXPERTS * SIZE * HIDDEN,), math.nan, device=tokens.device, dtype=tokens.dtype)
        with no_wait():
            by_group = chosen.flip(1)
            routing = route(by_group, CHOICES)
            ends = by_group.sum(0).cumsum(0, dtype=torch.int32)
            products = grouped_linear(routing.permutation.copy(tokens), ends, weights)
            activated = weighted_swiglu(products, routing.of_copies(probs.flip(1)))
            sums = routing.permutation.add_up(activated)
            sums.backward(grad)

    exact = tokens.detach().double().requires_grad_()
    exact_probs = probs.detach().double().requires_grad_()
    exact_matrices = [matrix.detach().double().requires_grad_() for matrix in matrices]
    expected = torch.zeros_like(sums, dtype=torch.float64)
    for expert, matrix in enumerate(exact_matrices):
        gate, up = (exact @ matrix.T).chunk(2, -1)
        weight = exact_probs[:, expert] * chosen[:, expert]
        expected = expected + gate * gate.sigmoid() * up * weight[:, None]
    expected.backward(grad.double())

    assert weights.stacked().data_ptr() == matrices[-1].data_ptr()
    assert distance(sums, expected) < BOUND
    assert distance(tokens.grad, exact.grad) < BOUND
    assert distance(probs.grad, exact_probs.grad) < BOUND
    for expert, (matrix, like) in enumerate(zip(matrices, exact_matrices, strict=True)):
        if chosen[:, expert].any():
            assert distance(matrix.main_grad, like.grad) < BOUND
        else:
            assert not matrix.main_grad.any(), "of an expert without tokens"


def test_received_tokens_are_sorted_without_a_wait() -> None:
    sizes = torch.tensor([[1, 3, 0], [2, 0, 0]], device=device.torch_device())
    rows = torch.arange(6.0, device=sizes.device)
    with no_wait():
        permutation = sort_chunks(sizes, len(rows))
        by_group = permutation.copy(rows)
        restored = permutation.add_up(by_group)
    assert by_group.tolist() == [0, 4, 5, 1, 2, 3]
    assert restored.equal(rows)
