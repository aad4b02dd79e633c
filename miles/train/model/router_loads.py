"""The choices of a step's routers: the tokens of every expert, and the loss that balances them.

    routing of each layer  ->  counts [layers, experts], sums of probabilities [experts]
                           ->  over all ranks, with the sums of the loss
                           ->  `RouterStats`, and how often each expert was chosen, for the next step

The balancing loss is that of Hugging Face's `load_balancing_loss_func` with the step as its batch:

    experts x sum over experts of (choices of the expert / rows) x (its probability, mean over rows)

A row is a token in a layer. All tokens of the step's samples count, trained or not, and no padding.
Two experts, one choice a row: evenly chosen, 2 x (1/2 x 1/2 + 1/2 x 1/2) = 1; all rows choose the
first with probability 0.8, 2 x (1 x 0.8 + 0 x 0.2) = 1.6.

Its gradient flows through the probabilities; how often experts are chosen is a constant in it. The
constant is that of the step before: of this step it is known only when every layer has seen every
micro-batch on every rank, and the first of them goes backward long before. The first step counts
its own choices ahead, in a forward pass of its own (docs/decisions/036-balancing-experts.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from miles.architecture.config import ModelShape
from miles.data.types import StepContent
from miles.train.model.device import torch_device
from miles.train.parallel_layout import Layout
from miles.train.types import RouterStats


class RouterLoads:
    """The loads of the experts in one step, on each rank and then over all of them.

    Args:
        gpt: a rank's `GPTModel`, whose routers are counted from now on in training.
        coefficient: of the balancing loss; 0: none.
    """

    def __init__(self, gpt: Any, shape: ModelShape, layout: Layout, coefficient: float) -> None:
        assert shape.num_experts is not None
        self._num_layers, self._num_experts = shape.num_layers, shape.num_experts
        self._num_choices = shape.moe_router_topk
        self._layout = layout
        self._coefficient = coefficient
        self._is_counting = False

        num_counts = shape.num_layers * shape.num_experts
        device = torch_device()
        self.sums = torch.zeros(num_counts + shape.num_experts, dtype=torch.float64, device=device)
        """float64 [layers x experts + experts]: choices, then sums of the probabilities"""
        self._counts = self._by_layer(self.sums)
        self._probabilities = self.sums[num_counts:]

        self.last_choices: Sequence[int] | None = None
        """how often each expert was chosen in the last step, over all layers; None: in none yet"""
        self._frequencies = torch.zeros(shape.num_experts, device=device)
        self._weights = torch.zeros(shape.num_experts, device=device)

        for layer in gpt.decoder.layers:
            _CountedRouter(self, layer)

    @property
    def must_count_ahead(self) -> bool:
        """Return whether the next step is to be balanced, and no step before it was counted."""
        return self._coefficient > 0 and self.last_choices is None

    def forget_step(self) -> None:
        """Begin to count anew."""
        self.sums.zero_()

    def begin_step(self, content: StepContent) -> None:
        """Begin to count anew, and say how much each choice weighs in the balancing loss."""
        self.forget_step()
        num_rows = self._num_layers * content.num_tokens
        # All gradients are divided by the trained tokens of the step in the end.
        scale = self._coefficient * self._num_experts * content.num_trained_tokens / num_rows
        self._weights = self._frequencies * scale

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count in the forward pass. What is computed again in the backward pass is not new."""
        self._is_counting = True
        try:
            yield
        finally:
            self._is_counting = False

    def own_tokens(self, num_tokens: int, num_real: int) -> int:
        """Return how many of this rank's tokens of a micro-batch are of samples. They come first.

        Args:
            num_tokens: that the rank has, padding included.
            num_real: tokens of the samples, on all tensor-parallel ranks together.
        """
        if not self._layout.sequence_parallel:
            return num_real
        from megatron.core import parallel_state

        begin = parallel_state.get_tensor_model_parallel_rank() * num_tokens
        return max(min(num_real - begin, num_tokens), 0)

    def add(self, layer: int, chosen: Tensor) -> None:
        """Add the choices of a layer's router, bool [tokens, experts].

        Args:
            layer: its number in the whole model, from 0.
        """
        if self._is_counting and len(chosen) > 0:
            self._counts[layer].add_(chosen.sum(0))

    def balanced(self, logits: Tensor, num_own: int) -> Tensor:
        """Return a router's logits, through which the gradient of the balancing loss flows back.

        Args:
            logits: [tokens, 1, experts]
            num_own: tokens of samples among them; they come first.
        """
        if not self._coefficient or num_own == 0:
            return logits
        probabilities = torch.softmax(logits[:num_own].float(), dim=-1).sum((0, 1))
        if self._is_counting:
            self._probabilities.add_(probabilities.detach())
        if not torch.is_grad_enabled():
            return logits

        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        # Megatron multiplies this gradient by the loss scale, as that of the loss.
        balanced: Tensor = MoEAuxLossAutoScaler.apply(logits, probabilities @ self._weights)
        return balanced

    def finish_step(self, sums: Tensor, on_host: Tensor, *, is_taken: bool) -> RouterStats:
        """Return the statistics of a step.

        Args:
            sums: those of all ranks, in the form of `self.sums`.
            on_host: the same on the host.
            is_taken: the next step balances the choices of this one. A skipped step changes nothing.
        """
        if self._coefficient and is_taken:
            self.balance(sums)
            self.last_choices = [int(count) for count in self._by_layer(on_host).sum(0).tolist()]
        return self._stats(on_host)

    def continue_from(self, choices: Sequence[int]) -> None:
        """Balance the choices of the last step before a checkpoint (`last_choices`)."""
        self.last_choices = choices
        self._balance_choices(torch.tensor(choices, dtype=torch.float64, device=self.sums.device))

    def balance(self, sums: Tensor) -> None:
        """Have the next step balance what was chosen.

        Args:
            sums: those of all ranks, in the form of `self.sums`.
        """
        self._balance_choices(self._by_layer(sums).sum(0))

    def _stats(self, sums: Tensor) -> RouterStats:
        counts = self._by_layer(sums)
        shares = counts / counts.sum(1, keepdim=True)

        aux_loss = None
        if self._coefficient:
            choices = counts.sum(0)
            num_rows = choices.sum() / self._num_choices
            products = (choices / num_rows) * (sums[counts.numel() :] / num_rows)
            aux_loss = self._num_experts * float(products.sum())
        return RouterStats(
            max_load=self._num_experts * float(shares.max()),
            entropy=float(torch.special.entr(shares).sum(1).min()),
            aux_loss=aux_loss,
        )

    def _balance_choices(self, choices: Tensor) -> None:
        """Take float64 [experts], how often each was chosen, for what the next step balances."""
        self._frequencies = (choices * (self._num_choices / choices.sum())).float()

    def _by_layer(self, sums: Tensor) -> Tensor:
        """Return the choices, [layers, experts], of sums in the form of `self.sums`."""
        num_counts = self._num_layers * self._num_experts
        return sums[:num_counts].view(self._num_layers, self._num_experts)


class _CountedRouter:
    """The routing of a layer, which shows the loads what it does in training.

    Args:
        layer: Megatron's `TransformerLayer`.
    """

    def __init__(self, loads: RouterLoads, layer: Any) -> None:
        self._loads = loads
        self._router = layer.mlp.router
        self._layer: int = layer.layer_number - 1
        self._route = self._router.routing
        self._num_real = 0

        # A layer is told of the micro-batch, its router is not; and again when it is recomputed.
        layer.register_forward_pre_hook(self._note, with_kwargs=True)
        self._router.routing = self._routing

    def _note(self, layer: Any, arguments: Any, keywords: Mapping[str, Any]) -> None:
        self._num_real = keywords["packed_seq_params"].num_real

    def _routing(self, logits: Tensor, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        """Return the weights and the choices of a layer's tokens, as Megatron's `routing` does."""
        if not self._router.training:
            probs, chosen = self._route(logits, *arguments, **keywords)
            return probs, chosen

        num_own = self._loads.own_tokens(len(logits), self._num_real)
        logits = self._loads.balanced(logits, num_own)
        probs, chosen = self._route(logits, *arguments, **keywords)
        self._loads.add(self._layer, chosen[:num_own])
        return probs, chosen
