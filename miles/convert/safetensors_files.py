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
from miles.common.checkpoint_folder import PEFT_WEIGHTS
from miles.common.untrusted_files import require_readable
from miles.convert import parallel, tensor_io
from miles.convert.path_safety import require_inside
from miles.errors import CheckpointError, SourceError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = PEFT_WEIGHTS
"""The one file of PEFT's tensors."""

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
_NO_HEADER = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)
"""The errors of JSON that is not the header of a file."""
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


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
        self.where = where or url
        self._url = url
        self.index = self._read_index() if single == SINGLE else {}
        """tensor -> file; empty without an index"""
        files = sorted(set(self.index.values())) if self.index else [self._require_single(single)]
        self._folder = Path(storage.filesystem(url)[1]) if storage.is_local(url) else None
        self._range_files: dict[str, storage.RangeFile] = {}
        # In threads: a store takes its time to answer, and large models have a hundred files.
        read_headers = parallel.each(files, lambda file, _: self._read_header(file))
        headers = dict(zip(files, read_headers, strict=True))

        self.tensors: dict[str, Stored] = {}
        """by name"""
        for header in headers.values():
            self.tensors.update(header)
        if self.index:
            self._require_index_fits(headers)

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
                tensor_io.fill_from(target, self._range_files[stored.file].read_range, begin)
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

    def _read_index(self) -> dict[str, str]:
        """Return the file of each tensor, as the index has it; none without an index."""
        url = storage.join(self._url, INDEX)
        require_inside(self._url, INDEX, self.where)
        if not storage.exists(url):
            return {}
        require_readable(url, CheckpointError)
        try:
            index: dict[str, str] = json.loads(storage.read_text(url))["weight_map"]
            files = set(index.values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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

    def _require_index_fits(self, headers: Mapping[str, Mapping[str, Stored]]) -> None:
        """Refuse an index that names a tensor which its file does not hold, or leaves one out."""
        for name, file in self.index.items():
            if name not in headers[file]:
                raise CheckpointError(
                    f"{self.where}/{file}: tensor {name} is missing, which {INDEX} puts there"
                )
        unlisted = sorted(set(self.tensors) - set(self.index))
        if unlisted:
            file = self.tensors[unlisted[0]].file
            raise CheckpointError(f"{self.where}/{file}: tensor {unlisted[0]} is not in {INDEX}")

    def _require_single(self, name: str) -> str:
        """Return the name of the one file of a checkpoint without an index, which is there."""
        require_inside(self._url, name, self.where)
        if storage.exists(storage.join(self._url, name)):
            return name
        old = next(
            (old for old in _OLD[name] if storage.exists(storage.join(self._url, old))), None
        )
        no_index = f", nor {INDEX}" if name == SINGLE else ""
        remedy = (
            f"; {old}, which is there, is a pickle, and is not read: save the model as safetensors"
            if old
            else ""
        )
        raise CheckpointError(f"{self.where}/{name}: no such file{no_index}{remedy}")

    def _read_header(self, file: str) -> dict[str, Stored]:
        """Return the tensors of a file, after comparing its header with its length."""
        where = f"{self.where}/{file}"
        content = storage.RangeFile(storage.join(self._url, file))
        self._range_files[file] = content
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
        first_byte = 8 + length
        if first_byte > num_bytes:
            raise CheckpointError(
                f"{where}: truncated: {num_bytes:,} bytes; its header alone has {length:,}"
            )

        try:
            header: dict[str, Any] = json.loads(content.read_range(8, first_byte))
            tensors, ends = _parse_header(header, file, first_byte)
        except _NO_HEADER as error:
            raise CheckpointError(f"{where}: not a safetensors header ({error!r})") from error
        _require_no_gaps(where, tensors, ends, first_byte, num_bytes)
        return tensors


def _parse_header(
    header: dict[str, Any], file: str, first_byte: int
) -> tuple[dict[str, Stored], dict[str, int]]:
    """Return the tensors of a header, and where each one ends, in bytes of the file.

    Args:
        header: the parsed JSON.
        file: its name.
        first_byte: behind the header.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is not the header of a safetensors file.
    """
    header.pop("__metadata__", None)
    tensors: dict[str, Stored] = {}
    ends: dict[str, int] = {}
    for name, entry in header.items():
        begin, end = (first_byte + _count(offset) for offset in entry["data_offsets"])
        shape = tuple(_count(size) for size in entry["shape"])
        tensors[name] = Stored(DTYPES[entry["dtype"]], shape, file, begin)
        ends[name] = end
    return tensors, ends


def _require_no_gaps(
    where: str,
    tensors: Mapping[str, Stored],
    ends: Mapping[str, int],
    first_byte: int,
    num_bytes: int,
) -> None:
    """Refuse a file whose bytes behind the header do not belong to one tensor each.

    Args:
        where: names the file.
        tensors, ends: of `_parse_header`.
        first_byte: behind the header.
        num_bytes: of the file.

    Raises:
        CheckpointError: names the first tensor that does not fit.
    """
    for name, stored in sorted(tensors.items(), key=lambda item: item[1].begin):
        if stored.begin + stored.num_bytes != ends[name]:
            raise CheckpointError(
                f"{where}: tensor {name} does not have the bytes that its shape asks for"
            )
        if ends[name] > num_bytes:
            raise CheckpointError(
                f"{where}: truncated: tensor {name} ends at byte {ends[name]:,}, the file at "
                f"{num_bytes:,}"
            )
    if first_byte + sum(stored.num_bytes for stored in tensors.values()) != num_bytes:
        raise CheckpointError(f"{where}: bytes that belong to no tensor, or to several")


def _count(value: Any) -> int:
    """Return a size or an offset of a header.

    Raises:
        TypeError: it is not a count.
    """
    if type(value) is not int or value < 0:
        raise TypeError(f"a count was expected, not {value!r}")
    return value


_OLD = {
    SINGLE: ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ADAPTER: ("adapter_model.bin",),
}
"""The pickles that would stand in the place of a file."""


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
