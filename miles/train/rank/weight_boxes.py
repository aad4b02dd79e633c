"""The weights of a rank as boxes of Megatron tensors, read from Hugging Face's files and written.

    GPTModel.sharded_state_dict()   ->   boxes: key, place of the layer and expert, offsets, data
    safetensors                     ->   each box's data, in place        load_weights
    each box's data                 ->   its place in safetensors         write_weights

A box is what the rank holds of a tensor, on any layout. Each rank reads and writes its own. After
reading, the same weights are there as after loading the converted checkpoint; what all ranks have
written together is what converting a checkpoint of this moment would write.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from miles.common import storage
from miles.common.storage import Report
from miles.convert import hf_boxes, parallel
from miles.convert.box_writer import BoxWriter
from miles.convert.peft_adapter import read_adapter
from miles.errors import CheckpointError
from miles.train.model.adapters import is_adapter
from miles.train.types import ExportPart, SaveFailure

if TYPE_CHECKING:
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
        CheckpointError: a checkpoint of another model, a file that cannot be read, or a folder that
            this machine does not have.
    """
    _require_on_this_machine(url)
    tensors = hf_boxes.open_weights(url, trainer.shape)

    def read(box: WeightBox, report: Report) -> None:
        tensors.read(box.key, box.place, box.offsets, box.data)

    parallel.each([box for box in weight_boxes(trainer.gpt) if not is_adapter(box.key)], read)
    trainer.copy_weights_to_optimizer()


def load_adapter(trainer: Trainer, url: str) -> None:
    """Read this rank's part of an adapter in PEFT's format, in place.

    Args:
        url: of the folder.

    Raises:
        CheckpointError: an adapter that cannot be read, another one than that of the trainer, or a
            folder that this machine does not have.
    """
    _require_on_this_machine(url)
    found = read_adapter(url, trainer.shape)
    if found.shape != trainer.adapter:
        raise CheckpointError(f"{url}: has changed since the run was started: another adapter")

    def read(box: WeightBox, report: Report) -> None:
        found.read(box.key, box.place, box.offsets, box.data)

    parallel.each([box for box in weight_boxes(trainer.gpt) if is_adapter(box.key)], read)
    trainer.copy_weights_to_optimizer()


def _require_on_this_machine(url: str) -> None:
    """Refuse a local folder that is not there."""
    if storage.is_local(url) and not storage.exists(url):
        raise CheckpointError(
            f"{url} is not on {socket.gethostname()}, where a rank begins from it: give a folder "
            "that all nodes share, or a URL such as s3://bucket/model"
        )


def write_weights(trainer: Trainer, folder: Path) -> ExportPart:
    """Write the weights whose main copy this rank holds into the files of a folder. Collective.

    They are those of the adapter, where one is trained.

    Args:
        folder: local, shared by all ranks, with files of the full size (`ExportPlan.create`,
            `AdapterPlan.create`).

    Returns:
        the bytes that are on the disk now, or why they are not.
    """
    trainer.gather_weights()
    try:
        writer = BoxWriter(folder, trainer.shape, trainer.adapter)
    except (CheckpointError, OSError) as error:
        return ExportPart(0, SaveFailure(str(error)))

    def write(box: WeightBox, report: Report) -> int:
        return writer.write(box.key, box.place, box.offsets, box.data)

    main_boxes = [box for box in weight_boxes(trainer.gpt) if box.is_main]
    of_adapter = trainer.adapter is not None
    own_boxes = [box for box in main_boxes if is_adapter(box.key) == of_adapter]
    try:
        num_bytes = sum(parallel.each(own_boxes, write))
        writer.sync()
    except OSError as error:
        return ExportPart(0, SaveFailure(f"{folder}: {error}"))
    finally:
        writer.close()
    return ExportPart(num_bytes)
