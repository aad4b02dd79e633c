"""The loss in pieces: equal to the plain one, with its gradients, and never a whole vocabulary."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from miles.train.model.output_loss import loss_in_pieces
from tests.support.losses import EXACT, HIDDEN, TOKENS, TRAINED, VOCABULARY, Problem

SINGLE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def group() -> Iterator[Any]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 13, 1000])
def test_pieces_equal_the_plain_loss(group: Any, chunk_size: int) -> None:
    problem = Problem.random()
    head = problem.head(group, chunk_size)
    problem.in_pieces(head, factor=3.0).require_equal(problem.plain(), factor=3.0)

    with torch.no_grad():
        losses = loss_in_pieces(problem.hidden, problem.targets, head)
    torch.testing.assert_close(losses.of_tokens, problem.plain().losses, **EXACT)
    torch.testing.assert_close(losses.total, problem.plain().losses.sum(), **EXACT)


@pytest.mark.parametrize("trained", [(), (17,), tuple(range(TOKENS))])
def test_none_one_or_all_tokens_are_trained(group: Any, trained: tuple[int, ...]) -> None:
    problem = Problem.random(trained)
    problem.in_pieces(problem.head(group)).require_equal(problem.plain())
    with torch.no_grad():
        losses = loss_in_pieces(problem.hidden, problem.targets, problem.head(group))
    assert losses.of_tokens.shape == (len(trained),)


def test_one_loss_alone_is_not_finite(group: Any) -> None:
    problem = Problem.random()
    with torch.no_grad():
        problem.hidden[TRAINED[5], 0] = float("nan")
        problem.hidden[0] = float("nan")  # not trained
    found = problem.in_pieces(problem.head(group))
    assert found.losses.isnan().nonzero().flatten().tolist() == [5]
    assert found.hidden[0].tolist() == [0.0] * HIDDEN


def with_main_grad(problem: Problem, value: float = 0.0) -> Problem:
    """Give the weight a buffer for its gradient, as Megatron's DDP does."""
    problem.weight.main_grad = torch.full_like(problem.weight, value, dtype=torch.float32)
    problem.weight.grad_added_to_main_grad = False
    return problem


def test_megatrons_sum_takes_the_gradient(group: Any) -> None:
    problem = with_main_grad(Problem.random(dtype=torch.float32), 100)
    found = problem.in_pieces(problem.head(group))

    expected = problem.plain()
    torch.testing.assert_close(found.hidden.double(), expected.hidden, **SINGLE)
    added = problem.weight.main_grad.double() - 100
    torch.testing.assert_close(added, expected.weight, rtol=1e-5, atol=1e-4)
    # DDP's hook wants a gradient, and does not add it.
    assert problem.weight.grad_added_to_main_grad
    assert found.weight is not None


def test_another_gradient_than_was_expected_is_refused(group: Any) -> None:
    problem = with_main_grad(Problem.random(dtype=torch.float32))
    with pytest.raises(RuntimeError, match="for another gradient of the loss"):
        problem.in_pieces(problem.head(group), factor=3.0)


def test_an_embedding_gets_its_own_part_by_autograd(group: Any) -> None:
    problem = with_main_grad(Problem.random(dtype=torch.float32))
    weight, targets = problem.weight, problem.targets
    ids = torch.arange(TOKENS) % VOCABULARY
    head = replace(problem.head(group), is_embedding=True)
    loss_in_pieces(F.embedding(ids, weight), targets, head).total.backward()

    twin = weight.detach().double().requires_grad_()
    rows = F.embedding(ids, twin)[targets.positions]
    labels = targets.labels[0, targets.positions]
    F.cross_entropy(rows @ twin.t(), labels, reduction="sum").backward()

    # DDP's hook adds the embedding's part to the output layer's.
    assert not weight.grad_added_to_main_grad
    assert weight.main_grad.abs().max() > 1
    torch.testing.assert_close((weight.main_grad + weight.grad).double(), twin.grad, **SINGLE)


def test_a_frozen_weight_gets_no_gradient(group: Any) -> None:
    problem = Problem.random()
    problem.weight.requires_grad_(False)
    found = problem.in_pieces(problem.head(group))
    torch.testing.assert_close(found.hidden, problem.plain().hidden, **EXACT)
    assert found.weight is None


LARGE = (256, 64, 600)
HALF_OF_LARGE = tuple(range(0, 256, 2))


def test_bfloat16_is_as_exact_as_the_plain_way(group: Any) -> None:
    problem = with_main_grad(Problem.random(HALF_OF_LARGE, torch.bfloat16, LARGE))
    found = problem.in_pieces(problem.head(group, 50))
    exact = problem.plain()
    plain = problem.plain(torch.bfloat16)

    def error(value: Tensor, expected: Tensor) -> float:
        return float((value.double() - expected).norm() / expected.norm())

    assert found.losses.dtype == torch.float32
    assert error(found.losses, exact.losses) <= 1.01 * error(plain.losses, exact.losses)
    assert error(found.hidden, exact.hidden) <= 1.1 * error(plain.hidden, exact.hidden) < 0.02
    of_sum = error(problem.weight.main_grad, exact.weight)
    assert of_sum <= 1.1 * error(plain.weight, exact.weight) < 0.02


def test_float16_keeps_small_gradients_by_its_loss_scale(group: Any) -> None:
    problem = Problem.random(dtype=torch.float16)
    with torch.no_grad():
        # The label is all but certain: every other token has a probability of about 1e-8, which
        # float16 knows as 0.
        problem.weight.mul_(0.01)
        problem.weight[0] = 1.8
        problem.hidden.fill_(1.3)
    problem.targets.labels.zero_()
    exact = problem.plain().weight[1:]
    scale = 2.0**16

    head = replace(problem.head(group), loss_scale=torch.tensor(scale))
    scaled = problem.in_pieces(head, factor=scale).weight[1:]
    torch.testing.assert_close(scaled.double() / scale, exact, rtol=0.1, atol=0)

    problem.weight.grad = None
    assert problem.in_pieces(problem.head(group)).weight[1:].abs().max() == 0


# --- memory


class LiveBytes(TorchDispatchMode):
    """A mode that adds up the memory of the tensors that operations allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.largest = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [value for value in args if isinstance(value, Tensor)]
        known = {value.untyped_storage().data_ptr() for value in inputs} - self._users.keys()
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            is_new = isinstance(value, Tensor) and not any(value is each for each in inputs)
            if is_new and value.untyped_storage().data_ptr() not in known:
                self._count(value)
        return result

    def _count(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self._users:
            self._users[place] = 0
            self.now += size
            self.peak = max(self.peak, self.now)
            self.largest = max(self.largest, size)
        self._users[place] += 1
        weakref.finalize(value, self._release, place, size)

    def _release(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            del self._users[place]
            self.now -= size


@dataclass(frozen=True)
class Formula:
    """The bytes of the docstring's table, for float32 in plain torch."""

    in_forward: int
    between: int
    in_backward: int

    @classmethod
    def of(cls, chunk_size: int, *, has_main_grad: bool) -> Formula:
        tokens, hidden, num_rows = LARGE
        rows = len(HALF_OF_LARGE) * hidden * 4
        between = rows if has_main_grad else rows + 4 * num_rows * hidden
        in_backward = between + tokens * hidden * 4 + num_rows * hidden * 4
        in_backward += 0 if has_main_grad else rows
        return cls(between + chunk_size * num_rows * (4 + 4), between, in_backward)


@pytest.mark.parametrize("has_main_grad", [True, False])
def test_memory_is_what_the_formula_says(group: Any, has_main_grad: bool) -> None:
    problem = Problem.random(HALF_OF_LARGE, torch.float32, LARGE)
    if has_main_grad:
        with_main_grad(problem)
    head = problem.head(group, 32)
    formula = Formula.of(32, has_main_grad=has_main_grad)

    saved: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return value

    with LiveBytes() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        total = loss_in_pieces(problem.hidden, problem.targets, head).total
    between = forward.now
    with LiveBytes() as backward:
        total.backward()

    assert forward.peak == pytest.approx(formula.in_forward, rel=0.03)
    assert between == pytest.approx(formula.between, rel=0.05)
    assert sum(saved.values()) == pytest.approx(formula.between, rel=0.04)
    assert formula.between + backward.peak == pytest.approx(formula.in_backward, rel=0.03)
    # Nothing of [trained tokens, vocabulary].
    assert forward.largest < len(HALF_OF_LARGE) * LARGE[2] * 4


def test_without_gradients_only_a_piece_is_there(group: Any) -> None:
    problem = Problem.random(HALF_OF_LARGE, torch.float32, LARGE)
    with torch.no_grad(), LiveBytes() as evaluation:
        loss_in_pieces(problem.hidden, problem.targets, problem.head(group, 32))
    assert evaluation.peak == pytest.approx(Formula.of(32, has_main_grad=True).in_forward, rel=0.03)
