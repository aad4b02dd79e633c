"""Greedy answers from the training model, on any layout.

    prompts -> forward pass -> the most likely next token of each -> appended -> forward pass -> …

Each token takes a whole forward pass over what stands before it: a look at what a model says in the midst of its
training, without a second copy of it, and no inference engine. All data ranks do the same, since experts that are
spread need all of them in step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from miles.data.types import MicroBatch
from miles.train.model.build import forward_packed, padded, single
from miles.train.parallel_layout import Layout


def greedy(
    model: Any,
    layout: Layout,
    rank: int,
    prompts: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    max_tokens: int,
) -> list[list[int]]:
    """The most likely continuations; collective, and the same on every rank.

    Args:
        model: the DDP wrapper around a `GPTModel`, in evaluation mode.
        prompts: token ids.
        stop_ids: tokens that end an answer; they are its last.
        max_tokens: of an answer.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    answers: list[list[int]] = [[] for _ in prompts]
    open_ones = list(range(len(prompts)))
    for _ in range(max_tokens):
        if not open_ones:
            break
        batches = [padded(single([*prompts[one], *answers[one]]), layout) for one in open_ones]
        with torch.no_grad():
            chosen = get_forward_backward_func()(
                forward_step_func=partial(_forward_step, layout=layout, rank=rank),
                data_iterator=iter(batches),
                model=[model],
                num_microbatches=len(batches),
                seq_length=max(len(batch.input_ids) for batch in batches),
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokens = torch.zeros(len(batches), dtype=torch.int64, device=device)
        if layout.is_last_stage(rank):
            tokens.copy_(torch.stack(chosen))
        if layout.pipeline > 1:
            torch.distributed.broadcast(
                tokens,
                parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        for one, token in zip(open_ones, tokens.tolist(), strict=True):
            answers[one].append(token)
        open_ones = [one for one in open_ones if answers[one][-1] not in stop_ids]
    return answers


def _forward_step(
    batches: Iterator[MicroBatch], model: Any, *, layout: Layout, rank: int
) -> tuple[Tensor, Any]:
    batch = next(batches)
    last = int(batch.cu_seqlens[1]) - 1

    def most_likely(logits: Tensor, non_loss_data: bool) -> Tensor:
        """int64, scalar: the token with the highest logit of all tensor ranks'; of equals, the lowest."""
        from megatron.core import parallel_state

        best, token = logits[0, last].float().max(dim=-1)
        if layout.tensor == 1:
            return token
        first_row = rank % layout.tensor * logits.shape[-1]
        own = torch.stack([best.double(), (token + first_row).double()])
        every = [torch.empty_like(own) for _ in range(layout.tensor)]
        torch.distributed.all_gather(
            every, own, group=parallel_state.get_tensor_model_parallel_group()
        )
        table = torch.stack(every)
        return table[table[:, 0].argmax(), 1].long()

    return forward_packed(model, batch, labels=False), most_likely
