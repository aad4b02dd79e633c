"""The weights of a rank as boxes of Megatron tensors, and their start from a Hugging Face folder.

    GPTModel.sharded_state_dict()   ->   boxes: key, place of the layer and expert, offsets, data
    safetensors                     ->   each box's data, in place

A box is what the rank holds of a tensor, on any layout. Each rank reads its own boxes; the same
weights are there as after loading the converted checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from miles.common.storage import Report
from miles.convert import hf_boxes, parallel
from miles.train.rank.trainer import Trainer


@dataclass(frozen=True)
class WeightBox:
    """The part of a Megatron tensor that a rank holds."""

    key: str
    """of the Megatron tensor"""
    place: tuple[int, ...]
    """in its leading axes: layer, expert"""
    offsets: tuple[int, ...]
    """where the part begins in the others"""
    data: Tensor
    """the values: a view of the model's own"""
    is_main: bool
    """no other rank writes the same part of a checkpoint"""


def weight_boxes(gpt: Any) -> list[WeightBox]:
    """Return the boxes of a rank's part of a `GPTModel`."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica

    boxes = []
    for value in gpt.sharded_state_dict().values():
        # A factory divides a tensor into several boxes: the gate and the up projection.
        parts = value.build() if isinstance(value, ShardedTensorFactory) else value
        for part in nested_values({"parts": parts}):
            if not isinstance(part, ShardedTensor):
                continue
            own = value.data.untyped_storage().data_ptr()
            assert part.data.untyped_storage().data_ptr() == own, f"{part.key} is a copy"

            depth = part.prepend_axis_num
            boxes.append(
                WeightBox(
                    part.key,
                    part.global_offset[:depth],
                    part.global_offset[depth:],
                    part.data.detach(),
                    is_main_replica(part.replica_id),
                )
            )
    return boxes


def load_weights(trainer: Trainer, url: str) -> None:
    """Read this rank's weights from a Hugging Face folder, in place.

    In memory there is no more than the boxes themselves and a buffer of bounded size a thread.

    Args:
        url: of the folder.

    Raises:
        CheckpointError: a checkpoint of another model, or a file that cannot be read.
    """
    tensors = hf_boxes.open_weights(url, trainer.shape)

    def read(box: WeightBox, report: Report) -> None:
        tensors.read(box.key, box.place, box.offsets, box.data)

    parallel.each(weight_boxes(trainer.gpt), read)
    trainer.copy_weights_to_optimizer()
