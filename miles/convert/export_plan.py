"""The files of a Hugging Face checkpoint that is about to be written.

    the model's shape, DIR with the files that it came with   ->   each tensor's dtype, shape, file

They are planned before the first byte, created at their full size, and filled in any order, by one
process (`megatron_to_hf`) or by all ranks of a run (`box_writer`). Both give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from miles.architecture.config import ModelShape
from miles.architecture.families import pieces_of, stored_names
from miles.architecture.parameters import Parameter
from miles.common import atomic_folders, storage
from miles.common.untrusted_files import read_json
from miles.convert.companions import write_companions
from miles.convert.safetensors_files import (
    ShardedWriter,
    Spec,
    Weights,
    index_text,
    split_into_files,
)
from miles.convert.safetensors_headers import INDEX, SINGLE
from miles.errors import CheckpointError

MAX_SHARD_BYTES = 5_000_000_000


class FilesPlan(Protocol):
    """The tensors to write of a checkpoint or of an adapter, and the file of each."""

    pieces: list[tuple[Parameter, tuple[int, ...]]]
    """the parameters and their places, in the order of the model"""
    tensors: dict[str, Spec]
    """dtype and shape, by name"""

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all tensors."""

    def create(self, folder: Path) -> ShardedWriter:
        """Create the files of tensors at their full size in an empty local folder."""

    def complete(self, folder: Path, chat_template: str | None) -> None:
        """Add the files beside them."""


class ExportPlan:
    """The tensors of a checkpoint to write, and the file of each.

    Args:
        hf_checkpoint: folder (fsspec URL) whose files beside the weights are copied. Where it holds
            weights, dtypes and files are those that they have there.
        shape: of the model.
        dtypes: of the Megatron tensors, by key: taken where nothing else says one.
        is_converted: the weights were only converted: without weights in `hf_checkpoint`, their
            dtypes count, and not the one of config.json.
        max_shard_bytes: of a file; None: the files of `hf_checkpoint`, or `MAX_SHARD_BYTES`.
    """

    def __init__(
        self,
        hf_checkpoint: str,
        shape: ModelShape,
        dtypes: Mapping[str, torch.dtype],
        *,
        is_converted: bool = False,
        max_shard_bytes: int | None = None,
    ) -> None:
        self._hf_checkpoint = hf_checkpoint
        original = _weights_of(hf_checkpoint)
        stored = {} if original is None else original.tensors
        default = None if is_converted else _config_dtype(hf_checkpoint)

        self.pieces = pieces_of(shape)
        """the parameters and their places, in the order of the model"""
        self.tensors: dict[str, Spec] = {}
        """dtype and shape, by name"""
        for parameter, place in self.pieces:
            own = dtypes[parameter.megatron]
            for name, sizes in zip(parameter.hf_names(place), parameter.shapes, strict=True):
                names = stored_names(name, shape, stored)
                original_spec = stored.get(names[0])
                dtype = (default or own) if original_spec is None else original_spec.dtype
                self.tensors.update(dict.fromkeys(names, Spec(dtype, sizes)))

        if max_shard_bytes is None and stored.keys() == self.tensors.keys():
            self.files = {name: tensor.file for name, tensor in stored.items()}
        else:
            self.files = split_into_files(self.tensors, max_shard_bytes or MAX_SHARD_BYTES)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def create(self, folder: Path) -> ShardedWriter:
        """Create the files of weights at their full size, and the index, in an empty local folder.

        Raises:
            CheckpointError: the disk has no room for them.
        """
        atomic_folders.require_room(folder, self.num_bytes)
        if len(set(self.files.values())) > 1:
            (folder / INDEX).write_text(index_text(self.tensors, self.files), encoding="utf-8")
        return ShardedWriter(folder, self.tensors, self.files)

    def complete(self, folder: Path, chat_template: str | None) -> None:
        """Add the files beside the weights (`write_companions`)."""
        write_companions(self._hf_checkpoint, folder, chat_template)


def _weights_of(hf_checkpoint: str) -> Weights | None:
    for name in (INDEX, SINGLE):
        if storage.exists(storage.join(hf_checkpoint, name)):
            return Weights(hf_checkpoint)
    return None


def _config_dtype(hf_checkpoint: str) -> torch.dtype | None:
    """Return the dtype that config.json names; None where it names none."""
    config: Mapping[str, str] = read_json(
        storage.join(hf_checkpoint, "config.json"), CheckpointError
    )
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return dtype if isinstance(dtype, torch.dtype) else None
