"""An adapter in PEFT's format: read as the Megatron tensors of a LoRA run, and written from them.

    DIR/adapter_config.json        its shape (`peft_config`)
    DIR/adapter_model.safetensors  A and B of each projection, by the names of `architecture.adapter`
    DIR/tokenizer.json, …          of the base, with the template that the run trained with

`read_adapter` opens such a folder, and `AdapterPlan` makes one, as `open_weights` and `ExportPlan`
do for a whole model. The tensors are the same in both formats, but stacked by layer in Megatron's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from miles.architecture.adapter import (
    ATTENTION_TARGETS,
    PEFT_PREFIX,
    TARGETS,
    AdapterShape,
    adapter_parameters,
    module_of,
)
from miles.architecture.config import ModelShape
from miles.architecture.families import pieces_in
from miles.architecture.parameters import Parameter
from miles.common import atomic_folders
from miles.convert.companions import write_tokenizer
from miles.convert.hf_boxes import HfTensors
from miles.convert.peft_config import CONFIG, PeftConfig, config_text, read_config
from miles.convert.safetensors_files import ShardedWriter, Spec, Weights
from miles.convert.safetensors_headers import ADAPTER
from miles.errors import CheckpointError, SourceError

_TENSOR = re.compile(
    re.escape(PEFT_PREFIX)
    + r"model\.layers\.(?P<layer>\d{1,9})\.\w+\.(?P<target>\w+)\.lora_[AB]\.weight"
)


@dataclass(frozen=True)
class PeftAdapter:
    """A folder in PEFT's format, whose headers have been read and fit a model."""

    url: str
    shape: AdapterShape
    tensors: HfTensors

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The dtypes of the Megatron tensors, by key."""
        return self.tensors.dtypes

    def read(
        self, key: str, place: Sequence[int], offsets: Sequence[int], target: Tensor
    ) -> Tensor:
        """Fill a tensor with a box of a Megatron tensor (`HfTensors.read`)."""
        return self.tensors.read(key, place, offsets, target)


def read_adapter(url: str, shape: ModelShape) -> PeftAdapter:
    """Open an adapter of a model. Only its configuration and the header of its file are read.

    Args:
        url: of the folder (fsspec URL).
        shape: of the model.

    Raises:
        CheckpointError: a file that is missing or broken; a setting that is refused
            (`peft_config`); a tensor that is missing, unexpected, or of another shape or dtype.
    """
    try:
        config = read_config(url)
        weights = Weights(url, single=ADAPTER)
    except SourceError as error:
        raise CheckpointError(str(error)) from error

    targets = _targets_in(weights, shape, config)
    adapter = AdapterShape(config.rank, config.alpha, targets, config.is_rank_stabilized)
    parameters = adapter_parameters(shape, adapter)
    _require_tensors(weights, pieces_in(parameters, shape), config)
    return PeftAdapter(url, adapter, HfTensors(weights, shape, parameters))


class AdapterPlan:
    """The tensors of an adapter to write, as `ExportPlan` is for a model.

    Args:
        hf_checkpoint: folder (fsspec URL) of the base: its tokenizer is copied.
        shape: of the model.
        adapter: what is written.
        dtypes: of the Megatron tensors, by key.
        dropout: that the adapter was trained with, for its configuration.
        base: the folder of its weights, by which PEFT finds them; None: `hf_checkpoint`.
    """

    def __init__(
        self,
        hf_checkpoint: str,
        shape: ModelShape,
        adapter: AdapterShape,
        dtypes: Mapping[str, torch.dtype],
        dropout: float = 0.0,
        base: str | None = None,
    ) -> None:
        self._base = base or hf_checkpoint
        self._hf_checkpoint = hf_checkpoint
        self._adapter = adapter
        self._dropout = dropout
        self.pieces = pieces_in(adapter_parameters(shape, adapter), shape)
        """the parameters and their places, in the order of the model"""

        self.tensors: dict[str, Spec] = {}
        """dtype and shape, by name"""
        for parameter, place in self.pieces:
            dtype = dtypes[parameter.megatron]
            for name, sizes in zip(parameter.hf_names(place), parameter.shapes, strict=True):
                self.tensors[name] = Spec(dtype, sizes)
        self.files = dict.fromkeys(self.tensors, ADAPTER)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def create(self, folder: Path) -> ShardedWriter:
        """Create the file of tensors at its full size in an empty local folder.

        Raises:
            WriteError: the disk has no room for it.
        """
        atomic_folders.require_room(folder, self.num_bytes)
        return ShardedWriter(folder, self.tensors, self.files)

    def complete(self, folder: Path, chat_template: str | None) -> None:
        """Add the tokenizer of the base, with the template of the run, and the configuration."""
        write_tokenizer(self._hf_checkpoint, folder, chat_template)
        text = config_text(self._adapter, self._base, self._dropout)
        (folder / CONFIG).write_text(text, encoding="utf-8")


def _targets_in(weights: Weights, shape: ModelShape, config: PeftConfig) -> tuple[str, ...]:
    """Return the projections that the tensors of a file belong to.

    The names in `target_modules` may be patterns. The tensors say what is there.
    """
    allowed = TARGETS if shape.num_experts is None else ATTENTION_TARGETS
    others = sorted(set(config.targets) - set(allowed))
    if others:
        raise CheckpointError(
            f"{config.where}: target_modules names {others[0][:100]}, which has no adapter here, only "
            f"{', '.join(allowed)} have one: train one without it, or merge this one with PEFT "
            "(merge_and_unload) and begin from the merged weights"
        )
    found: set[str] = set()
    for name in sorted(weights.tensors):
        target = _target_of(name)
        if target is None or target not in allowed:
            raise CheckpointError(
                f"{_file_of(weights)}: tensor {name[:200]} is not one of an adapter of this model's "
                f"{', '.join(allowed)}: there are no others here"
            )
        found.add(target)

    lacking = sorted(set(config.targets) - found)
    if lacking:
        raise CheckpointError(
            f"{config.where}: target_modules names {lacking[0][:100]}, of which {ADAPTER} holds no "
            f"tensor; an adapter of {', '.join(allowed)} was expected, with all its tensors"
        )
    if not found:
        raise CheckpointError(f"{_file_of(weights)}: holds no tensor of an adapter")
    return tuple(target for target in TARGETS if target in found)


def _target_of(name: str) -> str | None:
    """Return the projection that a tensor belongs to; None: it is not one of an adapter."""
    match = _TENSOR.fullmatch(name)
    if match is None or match["target"] not in TARGETS:
        return None
    module = module_of(match["target"]).format(layer=int(match["layer"]))
    return match["target"] if name.startswith(f"{PEFT_PREFIX}{module}.lora_") else None


def _require_tensors(
    weights: Weights, pieces: Sequence[tuple[Parameter, tuple[int, ...]]], config: PeftConfig
) -> None:
    """Refuse a file without a tensor, with one too many, or with one of another shape or kind."""
    expected: set[str] = set()
    for parameter, place in pieces:
        for name, sizes in zip(parameter.hf_names(place), parameter.shapes, strict=True):
            expected.add(name)
            stored = weights.tensors.get(name)
            if stored is None:
                raise CheckpointError(
                    f"{_file_of(weights)}: tensor {name} is missing; other layers have one"
                )
            if stored.shape != sizes:
                raise CheckpointError(
                    f"{_file_of(weights)}: tensor {name} has shape {stored.shape}; rank "
                    f"{config.rank} ({CONFIG}) and the model's sizes ask for {sizes}"
                )
            if not stored.dtype.is_floating_point or stored.dtype.itemsize == 1:
                raise CheckpointError(
                    f"{_file_of(weights)}: tensor {name} is {stored.dtype}; bfloat16, float16 or "
                    "float32 was expected"
                )

    extra = sorted(set(weights.tensors) - expected)
    if extra:
        raise CheckpointError(
            f"{_file_of(weights)}: tensor {extra[0]} is of a layer that the model does not have"
        )


def _file_of(weights: Weights) -> str:
    return f"{weights.where}/{ADAPTER}"
