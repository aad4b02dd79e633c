"""The loss in pieces: equal to the plain one, with its gradients, and never a whole vocabulary."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
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


def test_megatrons_sum_takes_the_gradient(group: Any) -> None:
    problem = Problem.random(dtype=torch.float32)
    problem.weight.main_grad = torch.full_like(problem.weight, 100)
    problem.weight.grad_added_to_main_grad = False

    found = problem.in_pieces(problem.head(group), factor=3.0)

    expected = 100 + 3 * problem.plain().weight
    torch.testing.assert_close(problem.weight.main_grad.double(), expected, rtol=1e-6, atol=1e-4)
    # DDP's hook wants a gradient, and does not add it.
    assert problem.weight.grad_added_to_main_grad
    assert found.weight is not None


def test_an_embedding_gets_its_own_part_by_autograd(group: Any) -> None:
    problem = Problem.random(dtype=torch.float32)
    weight, targets = problem.weight, problem.targets
    weight.main_grad = torch.zeros_like(weight)
    weight.grad_added_to_main_grad = False
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
    problem = Problem.random(HALF_OF_LARGE, torch.bfloat16, LARGE)
    problem.weight.main_grad = torch.zeros(LARGE[2], LARGE[1])
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


def formula(sizes: tuple[int, int, int], num_trained: int, chunk_size: int) -> list[int]:
    """Return the bytes of the docstring's table, for float32."""
    tokens, hidden, rows = sizes
    kept = num_trained * hidden * 4 + 4 * rows * hidden
    piece = min(chunk_size, num_trained) * rows * (4 + 4)
    handed_on = tokens * hidden * 4 + num_trained * hidden * 4
    return [kept + piece, kept, kept + handed_on + rows * hidden * 4]


def test_memory_is_what_the_formula_says(group: Any) -> None:
    problem = Problem.random(HALF_OF_LARGE, torch.float32, LARGE)
    problem.weight.main_grad = torch.zeros_like(problem.weight)
    head = problem.head(group, 32)
    in_forward, between, in_backward = formula(LARGE, len(HALF_OF_LARGE), 32)

    saved: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return value

    with LiveBytes() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        total = loss_in_pieces(problem.hidden, problem.targets, head).total
    assert forward.peak == pytest.approx(in_forward, rel=0.03)
    assert forward.now == pytest.approx(between, rel=0.03)
    assert sum(saved.values()) == pytest.approx(between, rel=0.01)

    with LiveBytes() as backward:
        total.backward()
    assert between + backward.peak == pytest.approx(in_backward, rel=0.03)

    # Nothing of [trained tokens, vocabulary], and without gradients only a piece.
    assert forward.largest < len(HALF_OF_LARGE) * LARGE[2] * 4
    with torch.no_grad(), LiveBytes() as evaluation:
        loss_in_pieces(problem.hidden, problem.targets, head)
    assert evaluation.peak == pytest.approx(in_forward - 4 * LARGE[2] * LARGE[1], rel=0.03)
