"""Greedy answers from the training model, on any layout.

    prompts -> forward pass -> the most likely next token of each -> appended -> forward pass -> …

Each token takes a forward pass over the whole sequence before it. That is slow, but it shows what
a model answers during its training without a second copy of the model and without an inference
engine. All data-parallel ranks do the same work, since experts that are spread over ranks need all
of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from miles.train.model.device import torch_device
from miles.train.model.device_batch import DeviceBatch, send_ahead
from miles.train.model.packed_forward import forward_packed, pad_for_tensor_ranks, single_sequence
from miles.train.parallel_layout import Layout


def greedy(
    model: Any,
    layout: Layout,
    rank: int,
    prompts: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    max_tokens: int,
) -> list[list[int]]:
    """Return the most likely continuations. Collective, and the same on every rank.

    Args:
        model: the DDP wrapper around a `GPTModel`, in evaluation mode.
        prompts: token ids.
        stop_ids: tokens that end an answer; such a token is the last of its answer.
        max_tokens: the most tokens of an answer.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    unfinished = list(range(len(prompts)))

    for _ in range(max_tokens):
        if not unfinished:
            break
        sequences = [[*prompts[index], *answers[index]] for index in unfinished]
        tokens = _next_tokens(model, layout, rank, sequences)
        for index, token in zip(unfinished, tokens, strict=True):
            answers[index].append(token)
        unfinished = [index for index in unfinished if answers[index][-1] not in stop_ids]

    return answers


def _next_tokens(
    model: Any, layout: Layout, rank: int, sequences: Sequence[Sequence[int]]
) -> list[int]:
    """Return the most likely next token of each sequence, on every rank."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    batches = [pad_for_tensor_ranks(single_sequence(ids), layout) for ids in sequences]
    with torch.no_grad():
        chosen = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, layout=layout, rank=rank),
            data_iterator=send_ahead(batches),
            model=[model],
            num_microbatches=len(batches),
            seq_length=max(len(batch.input_ids) for batch in batches),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )

    tokens = torch.zeros(len(batches), dtype=torch.int64, device=torch_device())
    if layout.is_last_stage(rank):
        tokens.copy_(torch.stack(chosen))
    if layout.pipeline > 1:
        torch.distributed.broadcast(
            tokens,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return tokens.tolist()


def _forward_step(
    batches: Iterator[DeviceBatch], model: Any, *, layout: Layout, rank: int
) -> tuple[Tensor, Any]:
    """Run one sequence forward; the second result picks the token from the logits."""
    batch = next(batches)
    # The first segment is the sequence; padding may follow it.
    last = int(batch.host.cu_seqlens[1]) - 1

    def most_likely(logits: Tensor, non_loss_data: bool) -> Tensor:
        return _argmax_over_tensor_ranks(logits[0, last].float(), layout, rank)

    return forward_packed(model, batch, with_labels=False), most_likely


def _argmax_over_tensor_ranks(logits: Tensor, layout: Layout, rank: int) -> Tensor:
    """Return the token with the highest logit of all tensor-parallel ranks; of equals, the lowest.

    Args:
        logits: float32 [vocabulary / tensor-parallel size], this rank's part.

    Returns:
        int64, scalar
    """
    from megatron.core import parallel_state

    best, token = logits.max(dim=-1)
    if layout.tensor == 1:
        return token

    first_row = rank % layout.tensor * logits.shape[-1]
    own = torch.stack([best.double(), (token + first_row).double()])
    gathered = [torch.empty_like(own) for _ in range(layout.tensor)]
    torch.distributed.all_gather(
        gathered, own, group=parallel_state.get_tensor_model_parallel_group()
    )
    table = torch.stack(gathered)
    return table[table[:, 0].argmax(), 1].long()
