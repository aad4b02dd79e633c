"""The safetensors files of a Hugging Face checkpoint, read and written tensor by tensor.

    8 bytes: length of the header | header: {"name": {"dtype", "shape", "data_offsets"}, …}, JSON | the tensors' bytes

`safetensors` itself maps a file into memory, or wants a whole one to write; both would hold a shard of many gigabytes.
The bytes written here are those that it would write. Format: https://huggingface.co/docs/safetensors
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
from miles.convert.path_safety import require_inside
from miles.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
"""As the header names them. Files hold the last of these first, so that each tensor is aligned."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class Spec:
    """What a tensor is, without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Stored(Spec):
    """A tensor of a checkpoint."""

    file: str
    """that it is in, without the folder"""
    begin: int
    """its first byte in the file"""


def is_weights(name: str) -> bool:
    """Whether a file is one of those that `Weights` reads."""
    return name == INDEX or (name.endswith(".safetensors") and "/" not in name)


class Weights:
    """The tensors of a checkpoint, one file or many.

    Args:
        url: the checkpoint's folder.
        where: names it in errors; None: `url`.

    Raises:
        CheckpointError: no safetensors, a file that is missing or cut short, an index that does not fit them or leads
            out of the folder.
    """

    def __init__(self, url: str, where: str | None = None) -> None:
        self.where = where or url
        self._url = url
        self.index = self._read_index()
        files = sorted(set(self.index.values())) if self.index else [self._single()]
        headers = {file: self._read_header(file) for file in files}
        for name, file in self.index.items():
            if name not in headers[file]:
                raise CheckpointError(
                    f"{self.where}/{file}: tensor {name} is missing, which {INDEX} puts there"
                )
        self.tensors = {
            name: stored for header in headers.values() for name, stored in header.items()
        }
        unlisted = sorted(set(self.tensors) - set(self.index)) if self.index else []
        if unlisted:
            file = self.tensors[unlisted[0]].file
            raise CheckpointError(f"{self.where}/{file}: tensor {unlisted[0]} is not in {INDEX}")

    @property
    def num_bytes(self) -> int:
        return sum(stored.num_bytes for stored in self.tensors.values())

    def read(self, name: str, target: Tensor) -> Tensor:
        """Fills a tensor of as many values, contiguous, and returns it. Local folders only."""
        stored = self.tensors[name]
        assert target.dtype == stored.dtype
        assert target.nbytes == stored.num_bytes
        with open(Path(storage.filesystem(self._url)[1], stored.file), "rb") as file:
            try:
                tensor_io.fill(target, file.fileno(), stored.begin)
            except EOFError as error:
                raise CheckpointError(
                    f"{self.where}/{stored.file}: truncated: tensor {name}: {error}"
                ) from error
            except OSError as error:
                raise CheckpointError(
                    f"{self.where}/{stored.file}: tensor {name} cannot be read ({error})"
                ) from error
        return target

    def _read_index(self) -> dict[str, str]:
        """Tensor -> file; empty without an index."""
        url = storage.join(self._url, INDEX)
        require_inside(self._url, INDEX, self.where)
        if not storage.exists(url):
            return {}
        try:
            index: dict[str, str] = json.loads(storage.read_text(url))["weight_map"]
            files = set(index.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.where}/{INDEX}: not an index of safetensors files ({error!r})"
            ) from error
        for file in sorted(files, key=str):
            tensor = next(tensor for tensor, of in index.items() if of == file)
            require_inside(self._url, file, f"{self.where}/{INDEX}: tensor {tensor}")
            if not storage.exists(storage.join(self._url, file)):
                raise CheckpointError(
                    f"{self.where}/{file}: no such file; {INDEX} puts tensor {tensor} there"
                )
        return index

    def _single(self) -> str:
        require_inside(self._url, SINGLE, self.where)
        if storage.exists(storage.join(self._url, SINGLE)):
            return SINGLE
        old = next((name for name in _OLD if storage.exists(storage.join(self._url, name))), None)
        raise CheckpointError(
            f"{self.where}/{SINGLE}: no such file, nor {INDEX}"
            + (
                f"; {old}, which is there, is a pickle, and is not read: save the model as safetensors"
                if old
                else ""
            )
        )

    def _read_header(self, file: str) -> dict[str, Stored]:
        where = f"{self.where}/{file}"
        content = storage.RangeFile(storage.join(self._url, file))
        num_bytes = content.seek(0, os.SEEK_END)
        if num_bytes < 8:
            raise CheckpointError(
                f"{where}: not a safetensors file, or truncated: {num_bytes} bytes"
            )
        (length,) = struct.unpack("<Q", content.read_range(0, 8))
        if length > _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{where}: not a safetensors file: its header would have {length:,} bytes"
            )
        if 8 + length > num_bytes:
            raise CheckpointError(
                f"{where}: truncated: {num_bytes:,} bytes, of which the header alone has {length:,}"
            )
        try:
            header: dict[str, Any] = json.loads(content.read_range(8, 8 + length))
            header.pop("__metadata__", None)
            tensors, ends = {}, {}
            for name, entry in header.items():
                begin, ends[name] = (
                    8 + length + _count(offset) for offset in entry["data_offsets"]
                )
                shape = tuple(_count(size) for size in entry["shape"])
                tensors[name] = Stored(DTYPES[entry["dtype"]], shape, file, begin)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{where}: not a safetensors header ({error!r})") from error
        for name, stored in sorted(tensors.items(), key=lambda item: item[1].begin):
            if stored.begin + stored.num_bytes != ends[name]:
                raise CheckpointError(
                    f"{where}: tensor {name} does not have the bytes that its shape asks for"
                )
            if ends[name] > num_bytes:
                raise CheckpointError(
                    f"{where}: truncated: tensor {name} ends at byte {ends[name]:,}, the file at {num_bytes:,}"
                )
        if 8 + length + sum(stored.num_bytes for stored in tensors.values()) != num_bytes:
            raise CheckpointError(f"{where}: bytes that belong to no tensor, or to several")
        return tensors


def _count(value: Any) -> int:
    """A size or an offset, as JSON may have it.

    Raises:
        TypeError: it is none.
    """
    if type(value) is not int or value < 0:
        raise TypeError(f"a count was expected, not {value!r}")
    return value


_OLD = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class ShardedWriter:
    """Files for tensors that are known beforehand and come in any order, from any thread.

    Args:
        folder: local; the files are made at once, at their full size.
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
            descriptor = os.open(folder / file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            self._descriptors.append(descriptor)
            header, begins = _header_of(members)
            os.truncate(
                descriptor, len(header) + sum(member.num_bytes for member in members.values())
            )
            os.pwrite(descriptor, header, 0)
            self._at.update(
                {name: (folder / file, descriptor, begin) for name, begin in begins.items()}
            )

    def write(self, name: str, tensor: Tensor) -> None:
        file, descriptor, begin = self._at[name]
        try:
            tensor_io.write(tensor, descriptor, begin)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from error

    def sync(self) -> None:
        """Returns when all is on the disk."""
        parallel.each(self._descriptors, lambda descriptor, _: os.fsync(descriptor))

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def split_into_files(tensors: Mapping[str, Spec], max_file_bytes: int) -> dict[str, str]:
    """Tensor -> file: in their order, a new file where the next one would make it larger than asked."""
    groups = parallel.grouped(list(tensors), lambda name: tensors[name].num_bytes, max_file_bytes)
    if len(groups) == 1:
        return dict.fromkeys(groups[0], SINGLE)
    return {
        name: f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        for number, group in enumerate(groups, 1)
        for name in group
    }


def index_text(tensors: Mapping[str, Spec], files: Mapping[str, str]) -> str:
    """The content of the index, as transformers writes it."""
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
    """The first bytes of a file, and where each of its tensors begins."""
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
    return struct.pack("<Q", len(text)) + text, {
        name: 8 + len(text) + begin for name, begin in begins.items()
    }
