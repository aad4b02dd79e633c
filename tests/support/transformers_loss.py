"""The loss of a model of transformers over the rows of a run: what an evaluation is compared with."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from miles.data.config import DataConfig
from miles.data.types import MicroBatch
from tests.support.streams import local


def loss_by_transformers(model: Any, config: DataConfig) -> float:
    """Return the mean loss of trained tokens, each sample by itself.

    Args:
        config: of the rows; those of all data-parallel ranks are taken.
    """
    batches: list[MicroBatch] = []
    for step in local(config):
        batches += chain.from_iterable(step.micro_batches)

    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            for begin, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
                part = slice(int(begin), int(end))
                logits = model(torch.from_numpy(batch.input_ids[part])[None]).logits[0]
                losses = torch.nn.functional.cross_entropy(
                    logits, torch.from_numpy(batch.labels[part]), reduction="none"
                )
                total += float((losses * torch.from_numpy(batch.loss_mask[part])).sum())
                count += int(batch.loss_mask[part].sum())
    return total / count
