"""The loss in pieces: equal to the plain one, with its gradients, and never a whole vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miles.train.model.output_loss import OutputHead, Targets, loss_in_pieces

TOKENS = 40
HIDDEN = 8
VOCABULARY = 30
TRAINED = (1, 2, 3, 7, 11, 12, 20, 21, 22, 23, 30, 38, 39)
EXACT = {"rtol": 1e-12, "atol": 1e-13}


@pytest.fixture(scope="module")
def group() -> Iterator[Any]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@dataclass
class Problem:
    """Hidden states, an output layer and labels; some of the tokens are trained."""

    hidden: Tensor
    weight: torch.nn.Parameter
    targets: Targets

    @classmethod
    def random(
        cls, trained: tuple[int, ...] = TRAINED, dtype: torch.dtype = torch.float64
    ) -> Problem:
        """Return a problem of random numbers, the same in every precision but for rounding."""
        generator = torch.Generator().manual_seed(5)
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        labels = torch.randint(VOCABULARY, (1, TOKENS), generator=generator)
        return cls(
            draw(TOKENS, HIDDEN).to(dtype).requires_grad_(),
            torch.nn.Parameter(draw(VOCABULARY, HIDDEN).to(dtype)),
            Targets(labels, torch.tensor(trained, dtype=torch.int64)),
        )

    def head(self, group: Any, chunk_size: int = 4) -> OutputHead:
        weight = self.weight
        return OutputHead(
            weight=weight,
            compute_logits=lambda rows: rows @ weight.t(),
            chunk_size=chunk_size,
            group=group,
            reduces_hidden=False,
            is_embedding=False,
        )

    def plain(self) -> Gradients:
        """Return torch's own losses and gradients, in float64."""
        hidden = self.hidden.detach().double().requires_grad_()
        weight = self.weight.detach().double().requires_grad_()
        rows = hidden[self.targets.positions]
        labels = self.targets.labels[0, self.targets.positions]
        losses = F.cross_entropy(rows @ weight.t(), labels, reduction="none")
        losses.sum().backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        return Gradients(losses.detach(), hidden.grad, weight.grad)

    def in_pieces(self, head: OutputHead, factor: float = 1.0) -> Gradients:
        """Return the losses in pieces, and the gradients of their sum times a factor."""
        self.hidden.grad = self.weight.grad = None
        losses = loss_in_pieces(self.hidden, self.targets, head)
        torch.testing.assert_close(losses.total, losses.of_tokens.sum())
        assert not losses.of_tokens.requires_grad
        (losses.total * factor).backward()
        assert self.hidden.grad is not None
        return Gradients(losses.of_tokens, self.hidden.grad, self.weight.grad)


@dataclass
class Gradients:
    losses: Tensor
    hidden: Tensor
    weight: Tensor | None

    def require_equal(self, expected: Gradients, factor: float = 1.0) -> None:
        torch.testing.assert_close(self.losses, expected.losses, **EXACT)
        torch.testing.assert_close(self.hidden, expected.hidden * factor, **EXACT)
        assert self.weight is not None
        assert expected.weight is not None
        torch.testing.assert_close(self.weight, expected.weight * factor, **EXACT)


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 13, 1000])
def test_pieces_equal_the_plain_loss(group: Any, chunk_size: int) -> None:
    problem = Problem.random()
    head = problem.head(group, chunk_size)
    problem.in_pieces(head, factor=3.0).require_equal(problem.plain(), factor=3.0)
    with torch.no_grad():
        losses = loss_in_pieces(problem.hidden, problem.targets, head)
    torch.testing.assert_close(losses.of_tokens, problem.plain().losses, **EXACT)


@pytest.mark.parametrize("trained", [(), (17,), tuple(range(TOKENS))])
def test_none_one_or_all_tokens_are_trained(group: Any, trained: tuple[int, ...]) -> None:
    problem = Problem.random(trained)
    problem.in_pieces(problem.head(group)).require_equal(problem.plain())
