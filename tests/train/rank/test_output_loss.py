"""The loss in pieces on real ranks: the gradients of a step are those of the plain loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miles.architecture.config import ModelShape
from miles.train.compute_config import ComputeConfig
from miles.train.parallel_layout import Layout
from tests.support.losses import VOCABULARY, Problem
from tests.support.ranks import SHAPE, batch, run_ranks, start, trainer_settings

TIED = replace(SHAPE, vocab_size=SHAPE.vocab_size + 1, tied_embeddings=True)
"""Two tensor-parallel ranks add a row of padding."""
UNTIED = replace(TIED, tied_embeddings=False)
PLAIN = 0
PIECES = 5
"""Trained tokens in a piece: the micro-batches have more, and not a multiple."""


def gradients(layout: Layout, rank: int, shape: ModelShape, chunk_size: int) -> dict[str, Any]:
    """Return the sums of a step's losses and, by name, the gradients, of freshly built weights."""
    from megatron.core import tensor_parallel

    from miles.train.rank.trainer import Trainer

    torch.manual_seed(7)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    settings = trainer_settings(shape, layout)
    # The output layer's part of a gradient must be there before a bucket of gradients is reduced.
    overlaps = chunk_size > 0 and layout.data > 1
    compute = ComputeConfig(
        loss_chunk_size=chunk_size, overlap_grad_reduce=overlaps, overlap_param_gather=overlaps
    )
    trainer = Trainer(replace(settings, compute=compute), rank)

    report, ranks = batch(0, layout, max_tokens=48)
    batches = list(ranks[layout.data_rank(rank)])
    # A micro-batch in which nothing is trained comes between the others.
    batches.insert(1, replace(batches[0], loss_mask=batches[0].loss_mask * 0))
    result = trainer.train_step(report, batches)
    found = {name: weight.main_grad.clone() for name, weight in trainer.gpt.named_parameters()}
    return {"losses": torch.tensor(result.source_losses), **found}


def differences(layout: Layout, rank: int, meeting: Path) -> dict[str, float]:
    """Return, by model and name, how far the gradients are apart, relative to the largest."""
    start(layout, rank, meeting)
    found = {}
    for model, shape in (("tied", TIED), ("untied", UNTIED)):
        plain = gradients(layout, rank, shape, PLAIN)
        pieces = gradients(layout, rank, shape, PIECES)
        assert plain.keys() == pieces.keys()
        for name, gradient in plain.items():
            assert gradient.abs().max() > 0, name
            apart = (gradient - pieces[name]).abs().max() / gradient.abs().max()
            found[f"{model} {name}"] = float(apart)
    return found


def compare_exactly(layout: Layout, rank: int, meeting: Path) -> None:
    """Compare a vocabulary that is divided over two ranks, one row of it padding, in float64."""
    from megatron.core import parallel_state

    start(layout, rank, meeting)
    whole = Problem.random()
    padded = F.pad(whole.weight.detach(), (0, 0, 0, 1), value=7.0)
    part = replace(whole, weight=torch.nn.Parameter(padded.chunk(2)[rank].clone()))

    def compute_logits(rows: Tensor) -> Tensor:
        logits = rows @ part.weight.t()
        logits[:, VOCABULARY - 16 * rank :] = torch.finfo(logits.dtype).min
        return logits

    head = replace(
        part.head(parallel_state.get_tensor_model_parallel_group()),
        compute_logits=compute_logits,
        reduces_hidden=True,
    )
    expected = whole.plain()
    expected.weight = F.pad(expected.weight, (0, 0, 0, 1)).chunk(2)[rank]
    part.in_pieces(head, factor=3.0).require_equal(expected, factor=3.0)


@pytest.mark.slow
def test_a_divided_vocabulary_is_exact() -> None:
    run_ranks(compare_exactly, Layout(2, tensor=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        Layout(1),
        Layout(2),
        Layout(2, tensor=2),
        Layout(2, tensor=2, sequence_parallel=True),
        Layout(2, pipeline=2),
    ],
    ids=str,
)
def test_pieces_give_the_gradients_of_the_plain_loss(layout: Layout) -> None:
    for by_name in run_ranks(differences, layout):
        assert any("embedding" in name or "output_layer" in name for name in by_name)
        assert {name: apart for name, apart in by_name.items() if apart > 1e-5} == {}
