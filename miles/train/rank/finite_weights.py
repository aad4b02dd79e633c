"""Weights that are NaN or infinite: found before the first step, and after a step that was skipped.

    the boxes of a rank -> one flag each, on the device -> one wait -> names, as people know them

    model.layers.3.self_attn.k_proj.weight (2 of 4,096 values)

Every loss of such a model is NaN, so that its rows would be blamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from miles.architecture.adapter import AdapterShape, adapter_parameters
from miles.architecture.config import ModelShape
from miles.architecture.families import parameters_of
from miles.architecture.parameters import Parameter
from miles.common.counts import counted
from miles.convert.hf_boxes import runs_in
from miles.errors import CheckpointError
from miles.train.rank.weight_boxes import WeightBox, weight_boxes
from miles.train.types import named

if TYPE_CHECKING:
    from miles.train.rank.trainer import Trainer


def require_finite(trainer: Trainer, url: str, *, with_optimizer: bool) -> None:
    """Refuse a model that was loaded with weights that are not finite.

    Args:
        url: of the checkpoint.
        with_optimizer: its state was loaded, too.

    Raises:
        CheckpointError: names the tensors of this rank.
    """
    broken = names_not_finite(trainer.gpt, trainer.shape, trainer.adapter)
    if not broken and with_optimizer and not _all_finite(_state_tensors(trainer.optimizer)):
        broken = ["the state of the optimizer"]
    if broken:
        raise CheckpointError(
            f"{url}: {named(broken)}: not finite (NaN or infinity), so that every loss would be "
            "NaN. Take weights that are whole: copy or convert them again, or begin from an "
            "earlier checkpoint"
        )


def names_not_finite(gpt: Any, shape: ModelShape, adapter: AdapterShape | None) -> list[str]:
    """Return the names of this rank's weights that are not finite.

    They are those of Hugging Face's tensors, or Megatron's key where it has no such tensor.

    Args:
        gpt: the `GPTModel`; its weights are those of the last step (`Trainer.gather_weights`).
        adapter: that it has beside its weights; its tensors have PEFT's names.
    """
    parameters = parameters_of(shape)
    if adapter is not None:
        parameters += adapter_parameters(shape, adapter)
    by_key = {parameter.megatron: parameter for parameter in parameters}
    boxes = weight_boxes(gpt)
    broken = _not_finite([box.data for box in boxes])
    names: list[str] = []
    for number in broken:
        key = boxes[number].key
        names += list(_names_of(boxes[number], by_key[key])) if key in by_key else [key]
    return list(dict.fromkeys(names))


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    return not _not_finite(tensors)


def _not_finite(tensors: Sequence[Tensor]) -> list[int]:
    """Return the numbers of the tensors that are not finite. The host waits once a device."""
    by_device: dict[torch.device, list[int]] = {}
    for number, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(number)

    broken: list[int] = []
    for numbers in by_device.values():
        flags = torch.stack([torch.isfinite(tensors[number]).all() for number in numbers])
        for number, is_finite in zip(numbers, flags.tolist(), strict=True):
            if not is_finite:
                broken.append(number)
    return sorted(broken)


def _names_of(box: WeightBox, parameter: Parameter) -> Iterator[str]:
    """Yield the names of the Hugging Face tensors that have a row of a box that is not finite."""
    num_broken = (~torch.isfinite(box.data)).reshape(len(box.data), -1).sum(dim=1)
    first = box.offsets[0]
    runs_of_names = runs_in(parameter, first, first + len(box.data))
    for name, runs in zip(parameter.hf_names(box.place), runs_of_names, strict=True):
        values = 0
        for run in runs:
            begin = run.row - first
            values += int(num_broken[begin : begin + run.num_rows].sum())
        if values:
            yield f"{name} ({counted(values, 'value')})"


def _state_tensors(optimizer: Any) -> list[Tensor]:
    """Return the tensors of an optimizer's state on this rank: master weights and moments."""
    tensors: list[Tensor] = []
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            tensors += group["params"]
        for state in part.optimizer.state.values():
            tensors += [value for value in state.values() if torch.is_tensor(value)]
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
