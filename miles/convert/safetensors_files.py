"""The safetensors files of a Hugging Face checkpoint, read and written tensor by tensor.

    8 bytes     the length of the header
    the header  JSON: {"name": {"dtype": …, "shape": …, "data_offsets": [begin, end]}, …}
    the rest    the tensors' bytes

`safetensors` itself maps a file into memory, or takes a whole one to write. Both would hold a
shard of many gigabytes. The bytes written here are those that it would write. Format:
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles.common import storage
from miles.convert import parallel, tensor_io
from miles.convert.safetensors_headers import INDEX, SINGLE, TYPES, Headers
from miles.errors import CheckpointError, SourceError

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, stored.torch_name) for name, stored in TYPES.items()
}
"""As the header names them, in the order of `TYPES`."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True)
class Spec:
    """A tensor without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Stored(Spec):
    """A tensor of a checkpoint."""

    file: str
    """the file that holds it, without the folder"""
    begin: int
    """its first byte in the file"""


def is_weights(name: str) -> bool:
    """Return whether a file is one of those that `Weights` reads."""
    return name == INDEX or (name.endswith(".safetensors") and "/" not in name)


class Weights:
    """The tensors of a checkpoint, one file or many.

    Args:
        url: the checkpoint's folder.
        where: names it in errors; None: `url`.
        single: the name of the file where there is only one. An index is that of `SINGLE` alone.

    Raises:
        CheckpointError: no safetensors, a file that is missing or cut short, an index that does not
            fit the files or leads out of the folder.
    """

    def __init__(self, url: str, where: str | None = None, single: str = SINGLE) -> None:
        self.headers = Headers(url, where, single)
        self.where = self.headers.where
        self.index = self.headers.index
        """tensor -> file; empty without an index"""
        self._folder = Path(storage.filesystem(url)[1]) if storage.is_local(url) else None
        self.tensors = {
            name: Stored(DTYPES[stored.type_name], stored.shape, stored.file, stored.begin)
            for name, stored in self.headers.tensors.items()
        }
        """by name"""

    @property
    def num_bytes(self) -> int:
        return sum(stored.num_bytes for stored in self.tensors.values())

    @property
    def is_local(self) -> bool:
        """Return whether the files are this machine's own."""
        return self._folder is not None

    def read(self, name: str, target: Tensor, first_byte: int = 0) -> Tensor:
        """Read a tensor, or some of its bytes. Of a remote folder, only these are fetched.

        Args:
            name: of the tensor.
            target: where to read it; contiguous, with the tensor's dtype.
            first_byte: of the tensor; as many as `target` has are read from there.

        Returns:
            `target`.

        Raises:
            CheckpointError: the file is cut short or cannot be read.
        """
        stored = self.tensors[name]
        assert target.dtype == stored.dtype
        assert first_byte + target.nbytes <= stored.num_bytes

        begin = stored.begin + first_byte
        try:
            if self._folder is None:
                tensor_io.fill_from(target, self.headers.range_files[stored.file].read_range, begin)
            else:
                with open(self._folder / stored.file, "rb") as file:
                    tensor_io.fill(target, file.fileno(), begin)
        except EOFError as error:
            raise CheckpointError(
                f"{self.where}/{stored.file}: truncated: tensor {name}: {error}"
            ) from error
        except (OSError, SourceError) as error:
            raise CheckpointError(
                f"{self.where}/{stored.file}: tensor {name} cannot be read ({error})"
            ) from error
        return target


class ShardedWriter:
    """Writes files of tensors, which come in any order and from any thread.

    Args:
        folder: local. The files are created at once, at their full size.
        tensors: of all files, by name.
        files: tensor -> file.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Spec], files: Mapping[str, str]) -> None:
        self._at: dict[str, tuple[Path, int, int]] = {}
        self._descriptors: list[int] = []
        of_file: dict[str, dict[str, Spec]] = {}
        for name, tensor in tensors.items():
            of_file.setdefault(files[name], {})[name] = tensor

        for file, members in of_file.items():
            path = folder / file
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            self._descriptors.append(descriptor)

            header, begins = _header_of(members)
            num_bytes = len(header) + sum(member.num_bytes for member in members.values())
            os.truncate(descriptor, num_bytes)
            os.pwrite(descriptor, header, 0)
            for name, begin in begins.items():
                self._at[name] = (path, descriptor, begin)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor to its place.

        Raises:
            OSError: names the file.
        """
        file, descriptor, begin = self._at[name]
        try:
            tensor_io.write(tensor, descriptor, begin)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from error

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        parallel.each(self._descriptors, lambda descriptor, _: os.fsync(descriptor))

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def split_into_files(tensors: Mapping[str, Spec], max_file_bytes: int) -> dict[str, str]:
    """Return the file of each tensor.

    The tensors keep their order. A file is closed before a tensor that would make it too large.
    """
    groups = parallel.grouped(list(tensors), lambda name: tensors[name].num_bytes, max_file_bytes)
    if len(groups) == 1:
        return dict.fromkeys(groups[0], SINGLE)
    files: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        files.update(dict.fromkeys(group, f"model-{number:05d}-of-{len(groups):05d}.safetensors"))
    return files


def index_text(tensors: Mapping[str, Spec], files: Mapping[str, str]) -> str:
    """Return the content of the index, as transformers writes it."""
    metadata = {
        "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
        "total_size": sum(tensor.num_bytes for tensor in tensors.values()),
    }
    weight_map = {name: files[name] for name in sorted(files)}
    return (
        json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
        + "\n"
    )


def _header_of(tensors: Mapping[str, Spec]) -> tuple[bytes, dict[str, int]]:
    """Return the first bytes of a file, and where each of its tensors begins."""
    order: Sequence[str] = sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    at = 0
    for name in order:
        tensor = tensors[name]
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.num_bytes],
        }
        begins[name] = at
        at += tensor.num_bytes

    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first_byte = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {
        name: first_byte + begin for name, begin in begins.items()
    }
