"""A small output layer with labels, and what torch's own cross entropy makes of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.train.model.output_loss import OutputHead, Targets, loss_in_pieces

TOKENS = 40
HIDDEN = 8
VOCABULARY = 31
TRAINED = (1, 2, 3, 7, 11, 12, 20, 21, 22, 23, 30, 38, 39)
EXACT = {"rtol": 1e-12, "atol": 1e-13}
"""Equal in float64, to rounding."""


@dataclass
class Gradients:
    """Losses of the trained tokens, and the gradients of their sum."""

    losses: Tensor
    hidden: Tensor
    weight: Tensor

    def require_equal(self, expected: Gradients, factor: float = 1.0) -> None:
        torch.testing.assert_close(self.losses, expected.losses, **EXACT)
        torch.testing.assert_close(self.hidden, expected.hidden * factor, **EXACT)
        torch.testing.assert_close(self.weight, expected.weight * factor, **EXACT)


@dataclass
class Problem:
    """Hidden states, an output layer and labels; some of the tokens are trained."""

    hidden: Tensor
    weight: Any
    targets: Targets

    @classmethod
    def random(
        cls,
        trained: tuple[int, ...] = TRAINED,
        dtype: torch.dtype = torch.float64,
        sizes: tuple[int, int, int] = (TOKENS, HIDDEN, VOCABULARY),
    ) -> Problem:
        """Return a problem of random numbers, the same in every precision but for rounding."""
        tokens, hidden, vocabulary = sizes
        generator = torch.Generator().manual_seed(5)
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        labels = torch.randint(vocabulary, (1, tokens), generator=generator)
        return cls(
            draw(tokens, hidden).to(dtype).requires_grad_(),
            torch.nn.Parameter(draw(vocabulary, hidden).to(dtype)),
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
            is_fused=True,
            is_embedding=False,
            loss_scale=torch.ones((), device=weight.device),
        )

    def plain(self, dtype: torch.dtype = torch.float64) -> Gradients:
        """Return torch's own losses and gradients; the logits are computed in the given type."""
        hidden = self.hidden.detach().to(dtype).requires_grad_()
        weight = self.weight.detach().to(dtype).requires_grad_()
        rows = hidden[self.targets.positions]
        logits = (rows @ weight.t()).to(torch.promote_types(dtype, torch.float32))
        labels = self.targets.labels[0, self.targets.positions]
        losses = F.cross_entropy(logits, labels, reduction="none")
        losses.sum().backward()
        return Gradients(losses.detach(), hidden.grad, weight.grad)

    def in_pieces(self, head: OutputHead, factor: float = 1.0) -> Gradients:
        """Return the losses in pieces, and the gradients of their sum times a factor."""
        losses = loss_in_pieces(self.hidden, self.targets, head)
        torch.testing.assert_close(losses.total, losses.of_tokens.sum(), equal_nan=True)
        assert not losses.of_tokens.requires_grad
        (losses.total * factor).backward()
        return Gradients(losses.of_tokens, self.hidden.grad, self.weight.grad)
