"""Products by groups against one product after another, with empty and uneven groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from miles.train.model.grouped_product import GroupedWeights, grouped_linear, view_as_one
from miles.train.model.weighted_swiglu import weighted_swiglu

WIDTH, SIZE = 16, 8
SIZES = [3, 0, 5, 1, 0]
"""The rows of each expert. The kernel takes float32; float64 is multiplied expert by expert."""
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}


def ends() -> Tensor:
    """Return where the rows of each group end, the last expert first."""
    return torch.tensor(SIZES[::-1]).cumsum(0, dtype=torch.int32)


def parameters(dtype: torch.dtype, gap: int = 0) -> list[torch.nn.Parameter]:
    """Return a matrix for each expert, in a buffer that is filled as Megatron's: the last first.

    Args:
        gap: unused elements before the third expert, as at a bucket's edge.
    """
    numel = WIDTH * SIZE
    buffer = torch.randn(len(SIZES) * (numel + 4) + gap, dtype=dtype)
    matrices = []
    for expert in range(len(SIZES)):
        start = (len(SIZES) - 1 - expert) * (numel + 4) + (gap if expert < 2 else 0)
        matrices.append(torch.nn.Parameter(buffer[start : start + numel].view(SIZE, WIDTH)))
        matrices[-1].data = buffer[start : start + numel].view(SIZE, WIDTH)
    return matrices


def one_by_one(rows: Tensor, matrices: list[torch.nn.Parameter]) -> Tensor:
    """Return the product of each expert's rows, the last expert first."""
    parts = rows.split(SIZES[::-1])
    pairs = zip(parts, reversed(matrices), strict=True)
    return torch.cat([part @ matrix.T for part, matrix in pairs])


def test_frozen_experts_are_used_where_they_lie() -> None:
    torch.manual_seed(1)
    matrices = [torch.nn.Parameter(torch.randn(SIZE, WIDTH), requires_grad=False) for _ in SIZES]
    before = torch.stack([matrix.detach() for matrix in reversed(matrices)])

    weights = GroupedWeights(matrices)
    stacked = weights.stacked()
    assert torch.equal(stacked, before)
    assert stacked.data_ptr() == matrices[-1].data_ptr()

    rows = torch.randn(sum(SIZES), WIDTH, requires_grad=True)
    grouped, plain = grouped_linear(rows, ends(), weights), one_by_one(rows, matrices)
    torch.testing.assert_close(grouped, plain)
    (mine,) = torch.autograd.grad(grouped.sum(), rows)
    (theirs,) = torch.autograd.grad(plain.sum(), rows)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("gap", [0, 4])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_groups_give_what_experts_give(dtype: torch.dtype, gap: int) -> None:
    torch.manual_seed(1)
    matrices = parameters(dtype, gap)
    weights = GroupedWeights(matrices)
    rows = torch.randn(sum(SIZES), WIDTH, dtype=dtype, requires_grad=True)
    grad = torch.randn(sum(SIZES), SIZE, dtype=dtype)

    grouped, plain = grouped_linear(rows, ends(), weights), one_by_one(rows, matrices)
    mine = torch.autograd.grad(grouped, [rows, *matrices], grad)
    theirs = torch.autograd.grad(plain, [rows, *matrices], grad)
    for one, other in zip((grouped, *mine), (plain, *theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])
    assert mine[2].abs().max() == 0, "an expert without tokens"


@pytest.mark.parametrize("dtype", BOUNDS)
def test_no_rows_at_all(dtype: torch.dtype) -> None:
    matrices = parameters(dtype)
    rows = torch.zeros(0, WIDTH, dtype=dtype, requires_grad=True)
    product = grouped_linear(rows, 0 * ends(), GroupedWeights(matrices))
    assert product.shape == (0, SIZE)
    grads = torch.autograd.grad(product.sum(), [rows, *matrices])
    assert [each.shape for each in grads[1:]] == [(SIZE, WIDTH)] * len(SIZES)
    assert all(each.abs().sum() == 0 for each in grads)


def test_weights_in_a_buffer_are_not_copied() -> None:
    matrices = parameters(torch.float32)
    weights = GroupedWeights(matrices)
    assert weights.stacked().data_ptr() == matrices[-1].data_ptr()
    torch.testing.assert_close(weights.stacked(), torch.stack(matrices[::-1]).detach())

    # What an optimizer writes is seen, and weights that move are found.
    matrices[1].data.fill_(3.0)
    assert weights.stacked()[-2].eq(3.0).all()
    for matrix in matrices:
        matrix.data = matrix.data.clone() + 1
    torch.testing.assert_close(weights.stacked(), torch.stack(matrices[::-1]).detach())


@pytest.mark.parametrize("gap", [1, 4])
def test_uneven_weights_are_stacked(gap: int) -> None:
    matrices = parameters(torch.float32, gap)
    assert view_as_one([each.detach() for each in reversed(matrices)]) is None
    stacked = GroupedWeights(matrices).stacked()
    torch.testing.assert_close(stacked, torch.stack(matrices[::-1]).detach())


def test_unaligned_strides_are_no_view() -> None:
    buffer = torch.zeros(200)
    assert view_as_one([buffer[start : start + 64] for start in (0, 66, 132)]) is None
    assert view_as_one([buffer[start : start + 64] for start in (0, 68, 136)]) is not None
    assert view_as_one([buffer[start : start + 64] for start in (136, 68, 0)]) is None


@pytest.mark.parametrize("gap", [0, 4])
def test_gradients_are_added_to_megatrons_sums_once(gap: int) -> None:
    """As Megatron's hook wants them: there, marked, and in memory that costs nothing."""
    torch.manual_seed(2)
    matrices = parameters(torch.float32, gap)
    storages = []
    accumulators = []
    for matrix, like in zip(matrices, parameters(torch.float32, gap), strict=True):
        matrix.main_grad = like.data.fill_(1.0)
        matrix.grad_added_to_main_grad = False

        def hook(*_: object, of: torch.nn.Parameter = matrix) -> None:
            assert of.grad is not None
            assert of.grad_added_to_main_grad
            storages.append(of.grad.untyped_storage().data_ptr())
            of.grad = None

        accumulators.append(matrix.expand_as(matrix).grad_fn.next_functions[0][0])
        accumulators[-1].register_hook(hook)

    rows = torch.randn(sum(SIZES), WIDTH)
    grad = torch.randn(sum(SIZES), SIZE)
    grouped_linear(rows, ends(), GroupedWeights(matrices)).backward(grad)
    theirs = torch.autograd.grad(one_by_one(rows, matrices), matrices, grad)

    for matrix, expected in zip(matrices, theirs, strict=True):
        torch.testing.assert_close(matrix.main_grad, 1 + expected)
    assert len(storages) == len(SIZES)
    assert len(set(storages)) == 1, "each gradient was copied"


def test_frozen_weights_get_no_gradient() -> None:
    matrices = parameters(torch.float32)
    for matrix in matrices:
        matrix.requires_grad_(False)
    rows = torch.randn(sum(SIZES), WIDTH, requires_grad=True)
    grouped_linear(rows, ends(), GroupedWeights(matrices)).sum().backward()
    assert rows.grad is not None
    assert all(matrix.grad is None for matrix in matrices)


def test_weighted_swiglu_is_its_definition() -> None:
    torch.manual_seed(3)
    gate_and_up = torch.randn(7, 2 * SIZE, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(7, dtype=torch.float64, requires_grad=True)
    gate, up = gate_and_up.chunk(2, -1)
    definition = gate / (1 + (-gate).exp()) * up * weights[:, None]
    torch.testing.assert_close(weighted_swiglu(gate_and_up, weights), definition)
    assert torch.autograd.gradcheck(weighted_swiglu, (gate_and_up, weights))


def test_weights_of_the_router_stay_in_float32() -> None:
    torch.manual_seed(4)
    gate_and_up = torch.randn(7, 2 * SIZE).bfloat16().requires_grad_()
    weights = torch.rand(7, requires_grad=True)
    product = weighted_swiglu(gate_and_up, weights)
    product.sum().backward()
    assert product.dtype == gate_and_up.grad.dtype == torch.bfloat16
    exact = weighted_swiglu(gate_and_up.double(), weights.double())
    torch.testing.assert_close(product.double(), exact, rtol=2**-7, atol=1e-6)
    assert weights.grad.dtype == torch.float32
