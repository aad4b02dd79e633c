"""The tensors of a Megatron checkpoint: compared with a parameter map, and read piece by piece.

A piece is a parameter at one place in its leading axes: the fused queries, keys and values of layer
3. `MegatronTensors` reads one as `hf_boxes.HfTensors` reads it from Hugging Face's files, so that a
conversion asks either (`Tensors`). `tensors_of` divides it into Hugging Face's tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from miles.architecture.config import ModelShape
from miles.architecture.parameters import Parameter
from miles.convert import tensor_io
from miles.convert.mismatch import missing_tensor, unexpected_tensors, wrong_shape
from miles.convert.torch_dist import Checkpoint
from miles.errors import CheckpointError


class Tensors(Protocol):
    """Megatron tensors that can be read, whatever the files hold."""

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The dtypes of the Megatron tensors, by key."""

    def read(
        self, key: str, place: Sequence[int], offsets: Sequence[int], target: Tensor
    ) -> Tensor:
        """Fill a tensor with a box of a Megatron tensor (`HfTensors.read`)."""


class MegatronTensors:
    """A Megatron checkpoint whose tensors are those of a parameter map.

    Args:
        checkpoint: of the model (`require_model`).
        shape: of the model.
        parameters: of the model, or of an adapter.

    Raises:
        CheckpointError: names the tensor that is missing, unexpected, or of another shape.
    """

    def __init__(
        self, checkpoint: Checkpoint, shape: ModelShape, parameters: Sequence[Parameter]
    ) -> None:
        _require_complete(checkpoint, shape, parameters)
        self._checkpoint = checkpoint
        self._num_rows = {parameter.megatron: parameter.shape[0] for parameter in parameters}
        self.dtypes = checkpoint.dtypes
        """by the key of the Megatron tensor"""

    def read(
        self, key: str, place: Sequence[int], offsets: Sequence[int], target: Tensor
    ) -> Tensor:
        """Fill a tensor with a box of a Megatron tensor. Rows of padding become zeros.

        Args:
            key: of the Megatron tensor.
            place: in its leading axes (layer, expert).
            offsets: where the box begins in the others.
            target: the tensor to fill; contiguous, with the dtype of the Megatron tensor.

        Returns:
            `target`.

        Raises:
            CheckpointError: a part of it is not stored.
        """
        num_rows = max(min(self._num_rows[key] - offsets[0], len(target)), 0)
        box = target[:num_rows].view(*(1 for _ in place), num_rows, *target.shape[1:])
        self._checkpoint.read(key, (*place, *offsets), box)
        target[num_rows:].zero_()
        return target


def require_model(checkpoint: Checkpoint, hf_checkpoint: str, shape: ModelShape) -> None:
    """Refuse a Megatron checkpoint of another model than a folder's.

    Raises:
        CheckpointError: names each difference.
    """
    differences = shape.differences(checkpoint.args)
    if differences:
        raise CheckpointError(
            f"{checkpoint.where}: a checkpoint of another model than {hf_checkpoint}: "
            f"{'; '.join(differences)}"
        )


def tensors_of(source: Tensors, parameter: Parameter, place: tuple[int, ...]) -> dict[str, Tensor]:
    """Read the Hugging Face tensors of one parameter at one place.

    Returns:
        name -> tensor. They are valid until this thread reads others.
    """
    dtype = source.dtypes[parameter.megatron]
    box = tensor_io.buffer("whole", parameter.shape, dtype)
    source.read(parameter.megatron, place, [0 for _ in parameter.shape], box)

    names = parameter.hf_names(place)
    parts = parameter.layout(box)
    tensors = {}
    for number, (name, part, sizes) in enumerate(zip(names, parts, parameter.shapes, strict=True)):
        if not part.is_contiguous():
            part = tensor_io.buffer(f"part {number}", part.shape, dtype).copy_(part)
        tensors[name] = part.view(sizes)
    return tensors


def _require_complete(
    checkpoint: Checkpoint, shape: ModelShape, parameters: Sequence[Parameter]
) -> None:
    """Refuse a Megatron checkpoint whose tensors are not those of a parameter map.

    Args:
        parameters: of the model, or of an adapter.

    Raises:
        CheckpointError: names the tensor that is missing, unexpected, or of another shape.
    """
    expected = {parameter.megatron: parameter for parameter in parameters}
    for key, parameter in expected.items():
        if key not in checkpoint.tensors:
            raise missing_tensor(checkpoint.where, key)

        stack = parameter.stack(shape)
        stored = tuple(checkpoint.tensors[key].size)
        num_rows = stored[len(stack)] if len(stored) > len(stack) else 0
        sizes = parameter.shape
        if parameter.is_vocabulary and num_rows > sizes[0]:  # rows of padding
            sizes = (num_rows, *sizes[1:])
        if stored != (*stack, *sizes):
            raise wrong_shape(checkpoint.where, key, stored, (*stack, *parameter.shape))

    extra = sorted(set(checkpoint.tensors) - set(expected))
    if extra:
        raise unexpected_tensors(checkpoint.where, extra)
