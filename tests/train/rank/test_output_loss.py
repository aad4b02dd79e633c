"""The loss in pieces on real ranks: the gradients of a step are those of the plain loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from miles.architecture.config import ModelShape
from miles.train.compute_config import ComputeConfig
from miles.train.parallel_layout import Layout
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
    trainer = Trainer(replace(settings, compute=ComputeConfig(loss_chunk_size=chunk_size)), rank)

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
