"""The forward pass over a packed micro-batch.

MicroBatch -> padded to what the tensor-parallel ranks divide -> DeviceBatch (device_batch) ->
rotation of each token (rotary) -> GPTModel
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from miles.data.types import DUMMY_ROW_ID, MicroBatch
from miles.train.model.adapter_dropout import token_keys
from miles.train.model.device_batch import DeviceBatch
from miles.train.model.output_loss import Targets
from miles.train.parallel_layout import Layout


def single_sequence(input_ids: Sequence[int]) -> MicroBatch:
    """Return a micro-batch of one sequence in which nothing is trained."""
    ids = np.asarray(input_ids, np.int64)
    return MicroBatch(
        input_ids=ids,
        labels=np.zeros_like(ids),
        position_ids=np.arange(len(ids), dtype=np.int64),
        loss_mask=np.zeros(len(ids), np.float32),
        cu_seqlens=np.array([0, len(ids)], np.int32),
        source_ids=np.zeros(1, np.int32),
        row_ids=np.full(1, DUMMY_ROW_ID, np.int64),
    )


def pad_for_tensor_ranks(micro_batch: MicroBatch, layout: Layout) -> MicroBatch:
    """Pad a micro-batch to a multiple of the tensor-parallel size in tokens.

    Only sequence parallelism, which divides the tokens over the tensor-parallel ranks, needs it;
    without it the micro-batch is returned as it is. The padding is one more segment at the end, in
    which nothing is trained.
    """
    if not layout.sequence_parallel:
        return micro_batch
    missing = -len(micro_batch.input_ids) % layout.tensor
    if not missing:
        return micro_batch

    zeros = np.zeros(missing, np.int64)
    end = micro_batch.cu_seqlens[-1] + missing
    return replace(
        micro_batch,
        input_ids=np.concatenate([micro_batch.input_ids, zeros]),
        labels=np.concatenate([micro_batch.labels, zeros]),
        position_ids=np.concatenate([micro_batch.position_ids, np.arange(missing)]),
        loss_mask=np.concatenate([micro_batch.loss_mask, zeros.astype(np.float32)]),
        cu_seqlens=np.append(micro_batch.cu_seqlens, end).astype(np.int32),
        # Source 0 is a valid index; the mask of zeros adds nothing to its sums.
        source_ids=np.append(micro_batch.source_ids, 0).astype(np.int32),
        row_ids=np.append(micro_batch.row_ids, DUMMY_ROW_ID),
    )


def forward_packed(model: Any, batch: DeviceBatch, *, with_labels: bool, step: int = 0) -> Any:
    """Run a model forward over a packed micro-batch.

    Args:
        model: a `PackedGPTModel`, or the DDP wrapper around one.
        with_labels: compute the loss.
        step: number of the step, which the dropout of adapters depends on.

    Returns:
        On the last pipeline stage with labels: the losses of the trained tokens, `TokenLosses`.
        On the last pipeline stage without labels: this rank's part of the logits,
        [1, tokens, vocabulary / tensor-parallel size].
        On other stages: the input of the next stage.
    """
    from miles.train.model.packed_params import packed_params

    gpt = getattr(model, "module", model)
    frequencies = gpt.packed_rotary
    rotation = None if frequencies is None else frequencies.rotation(batch.position_ids)
    dropout_keys = None
    if gpt.lora is not None and gpt.lora.dropout > 0 and gpt.training:
        dropout_keys = token_keys(batch, gpt.lora.seed, step)

    return model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=None,
        labels=Targets(batch.labels, batch.trained_positions) if with_labels else None,
        packed_seq_params=packed_params(batch, rotation, dropout_keys),
    )
