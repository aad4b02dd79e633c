"""Megatron's `GPTModel` with a loss that is computed in pieces (`output_loss`).

Without labels, and on every pipeline stage but the last, it is Megatron's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from miles.train.model.output_loss import OutputHead, Targets, TokenLosses, loss_in_pieces
from miles.train.types import AdapterSettings


class PackedGPTModel(GPTModel):  # type: ignore[misc]
    """A `GPTModel` that takes `Targets` as its labels and returns `TokenLosses`.

    `loss_chunk_size` is the number of trained tokens in a piece of the loss; 0: the logits of the
    whole micro-batch, by Megatron. `lora` says which adapters are trained; None: all weights are.
    """

    loss_chunk_size = 0
    is_loss_fused = True
    lora: AdapterSettings | None = None

    # megatron-core 0.16.1 and 0.19 hand `labels` to this method and to nothing else.
    def _postprocess(
        self, hidden_states: Tensor, *, labels: Targets | None, **arguments: Any
    ) -> Any:
        """Return the losses; the logits without labels; the hidden states on other stages."""
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, labels=None, **arguments)

        if self.loss_chunk_size == 0:
            losses = super()._postprocess(hidden_states, labels=labels.labels, **arguments)
            losses = losses.flatten().index_select(0, labels.positions)
            return TokenLosses(losses.sum(), losses.detach())

        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        with self._whole_sequence():
            return loss_in_pieces(hidden_states.squeeze(1), labels, self._head())

    def _head(self) -> OutputHead:
        """Return the output layer as the loss uses it."""
        weight = self.output_layer.weight
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()

        def compute_logits(rows: Tensor) -> Tensor:
            # A call, not a product with the weight: hooks of the layer wait for the weight, and
            # mask the rows of padding.
            logits, _ = self.output_layer(rows[:, None], weight=weight)
            return logits[:, 0]

        loss_scale = torch.ones((), device=weight.device)
        if self.config.grad_scale_func is not None:
            loss_scale = self.config.grad_scale_func(loss_scale).reshape(())

        return OutputHead(
            weight=weight,
            compute_logits=compute_logits,
            chunk_size=self.loss_chunk_size,
            group=self.tp_group,
            reduces_hidden=self.tp_group.size() > 1 and not self.config.sequence_parallel,
            is_fused=self.is_loss_fused,
            is_embedding=self.share_embeddings_and_output_weights and self.pre_process,
            loss_scale=loss_scale,
        )

    @contextlib.contextmanager
    def _whole_sequence(self) -> Iterator[None]:
        """Have the output layer take rows of the whole sequence, which is gathered already."""
        was_parallel = self.output_layer.sequence_parallel
        self.output_layer.sequence_parallel = False
        try:
            yield
        finally:
            self.output_layer.sequence_parallel = was_parallel
