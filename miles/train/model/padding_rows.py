"""Rows of padding: the vocabulary of a model whose tensor-parallel size does not divide it.

    a vocabulary of 151,669, tensor-parallel size 2   ->   151,670 rows, 75,835 on each rank
    tensor rank 0                                          the tokens 0 to 75,834
    tensor rank 1                                          the tokens 75,835 to 151,668, 1 padding

A row of padding belongs to no token, whatever a checkpoint holds in its place: it is zero after a
load. Its logit is the lowest there is, so that it adds nothing to a softmax, gets no gradient, and
is never the most likely token. An export leaves it out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from miles.architecture.config import ModelShape
from miles.architecture.sizes import padded_vocab_size


def num_token_rows(shape: ModelShape, tensor: int, tensor_rank: int) -> int:
    """Return how many rows of a tensor-parallel rank are tokens'. Those behind them are padding.

    Args:
        tensor: tensor-parallel size.
        tensor_rank: the rank's place among the tensor-parallel ranks.
    """
    num_rows = padded_vocab_size(shape, tensor) // tensor
    return min(max(shape.vocab_size - tensor_rank * num_rows, 0), num_rows)


def mask_padding_rows(model: Any, shape: ModelShape) -> None:
    """Have the output layer give the lowest logit for this rank's rows of padding.

    Args:
        model: this rank's part of a `GPTModel`, on any pipeline stage.
    """
    if model.post_process:
        mask = partial(_mask_logits, _num_own_token_rows(shape))
        model.output_layer.register_forward_hook(mask)


def zero_padding_rows(model: Any, shape: ModelShape) -> None:
    """Set this rank's rows of padding to zero, in the embedding and in the output layer.

    Args:
        model: this rank's part of a `GPTModel`, on any pipeline stage.
    """
    num_rows = _num_own_token_rows(shape)
    with torch.no_grad():
        if model.pre_process:
            model.embedding.word_embeddings.weight[num_rows:].zero_()
        # An output layer without a weight of its own takes that of the embedding.
        if model.post_process and model.output_layer.weight is not None:
            model.output_layer.weight[num_rows:].zero_()


def _num_own_token_rows(shape: ModelShape) -> int:
    from megatron.core import parallel_state

    return num_token_rows(
        shape,
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )


def _mask_logits(
    num_rows: int, layer: Any, inputs: Any, output: tuple[Tensor, Tensor | None]
) -> None:
    """Replace the logits behind the first `num_rows`, in place: a copy would take as much memory.

    Autograd need not know: where a softmax is 0, so is its derivative.
    """
    logits, _ = output  # [tokens, 1, rows of this rank]
    with torch.no_grad():
        logits[..., num_rows:] = torch.finfo(logits.dtype).min
