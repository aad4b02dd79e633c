"""The loss in pieces on a GPU: its kernels, its numbers, its memory, and that the host never waits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from miles.train.model import device, softmax
from miles.train.model.output_loss import Targets, loss_in_pieces
from tests.support.losses import Problem

SIZES = (700, 256, 30_001)
"""Tokens, hidden size, rows of the vocabulary."""
TRAINED = tuple(range(3, 690, 2))
CHUNK_SIZE = 86
"""Four equal pieces."""
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of the difference's norm to the reference's: a few roundings."""


def problem_of(dtype: torch.dtype) -> Problem:
    """Return a problem on the device, with a buffer of Megatron's for the weight's gradient."""
    problem = Problem.random(TRAINED, dtype, SIZES)
    where = device.torch_device()
    problem.hidden = problem.hidden.detach().to(where).requires_grad_()
    problem.weight = torch.nn.Parameter((problem.weight.detach() / 16).to(where))
    problem.weight.main_grad = torch.zeros_like(problem.weight, dtype=torch.float32)
    targets = problem.targets
    problem.targets = Targets(targets.labels.to(where), targets.positions.to(where))
    return problem


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the difference's norm to the reference's."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("num_columns", [75_835, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_equal_plain_torch(dtype: torch.dtype, num_columns: int) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, num_columns, generator=generator) * 8
    logits[0, -3:] = torch.finfo(dtype).min
    logits = logits.to(device.torch_device(), dtype)
    columns = torch.tensor([0, num_columns - 1, -1, num_columns], device=logits.device)

    plain = softmax.row_sums(logits, columns, is_fused=False)
    torch.testing.assert_close(softmax.row_sums(logits, columns), plain, rtol=1e-5, atol=0)

    scale = torch.tensor(4.0, device=logits.device)
    arguments = (columns, plain[0], scale / plain[1], scale)
    expected = softmax.turn_into_gradient(logits.clone(), *arguments, is_fused=False)
    found = softmax.turn_into_gradient(logits.clone(), *arguments)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-6)


def test_kernels_run_here() -> None:
    if device.has_gpu():
        assert softmax._kernels_on_gpu() is not None


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=["float32", "bfloat16"])
def test_losses_and_gradients_are_the_plain_ones(dtype: torch.dtype) -> None:
    group: Any = torch.distributed.group.WORLD
    problem = problem_of(dtype)
    exact = problem.plain()
    head = problem.head(group, CHUNK_SIZE)

    found = problem.in_pieces(head)
    assert distance(found.losses, exact.losses) < BOUNDS[dtype]
    assert distance(found.hidden, exact.hidden) < BOUNDS[dtype]
    assert distance(problem.weight.main_grad, exact.weight) < BOUNDS[dtype]

    with torch.no_grad():
        losses = loss_in_pieces(problem.hidden, problem.targets, replace(head, is_fused=False))
    assert distance(losses.of_tokens, exact.losses) < BOUNDS[dtype]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_host_never_waits_and_memory_is_as_documented() -> None:
    group: Any = torch.distributed.group.WORLD
    problem = problem_of(torch.bfloat16)
    head = problem.head(group, CHUNK_SIZE)
    problem.in_pieces(head)  # compiles the kernels, allocates cuBLAS's workspace

    tokens, hidden, rows = SIZES
    kept = len(TRAINED) * hidden * 2
    problem.hidden.grad = problem.weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = loss_in_pieces(problem.hidden, problem.targets, head).total
        in_forward = torch.cuda.max_memory_allocated() - before
        between = torch.cuda.memory_allocated() - before
        total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert between == pytest.approx(kept, rel=0.05)
    # Labels, sums and one piece's rows are small beside the logits, but not at this size.
    small = tokens * hidden * 2 + (1 << 17)
    assert in_forward == pytest.approx(kept + CHUNK_SIZE * rows * 2, rel=0.05, abs=small)
    in_backward = torch.cuda.max_memory_allocated() - before
    assert in_backward <= 1.05 * max(in_forward, kept + (tokens + rows) * hidden * 2)
