"""The headers of a Hugging Face checkpoint's safetensors files: its tensors without their values.

    model.safetensors.index.json   which file has which tensor; not there if there is one file
    model-00001-of-00002.safetensors, ...   each begins with a header
    ->  {"lm_head.weight": StoredTensor("BF16", (151936, 4096), file, first byte), ...}

Nothing here needs torch: a start looks at headers before anything is loaded.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles.common import storage
from miles.common.checkpoint_folder import PEFT_WEIGHTS
from miles.common.untrusted_files import require_readable
from miles.convert import parallel
from miles.convert.path_safety import require_inside
from miles.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = PEFT_WEIGHTS
"""The one file of PEFT's tensors."""

_NO_HEADER = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)
"""The errors of JSON that is not the header of a file."""
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class StoredType:
    """A kind of numbers that files hold."""

    torch_name: str
    """of its `torch.dtype`, without `torch.`"""
    num_bytes: int
    """of a number"""
    is_trainable: bool = False
    """weights of this kind can be trained: floats that are not quantized"""

    def __str__(self) -> str:
        return f"torch.{self.torch_name}"


TYPES = {
    "BOOL": StoredType("bool", 1),
    "U8": StoredType("uint8", 1),
    "I8": StoredType("int8", 1),
    "F8_E5M2": StoredType("float8_e5m2", 1),
    "F8_E4M3": StoredType("float8_e4m3fn", 1),
    "I16": StoredType("int16", 2),
    "F16": StoredType("float16", 2, is_trainable=True),
    "BF16": StoredType("bfloat16", 2, is_trainable=True),
    "I32": StoredType("int32", 4),
    "F32": StoredType("float32", 4, is_trainable=True),
    "F64": StoredType("float64", 8, is_trainable=True),
    "I64": StoredType("int64", 8),
}
"""As the header names them. Files hold the last of these first, so that each tensor is aligned."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, by the header of its file."""

    type_name: str
    """one of `TYPES`"""
    shape: tuple[int, ...]
    file: str
    """the file that holds it, without the folder"""
    begin: int
    """its first byte in the file"""

    @property
    def type(self) -> StoredType:
        return TYPES[self.type_name]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.type.num_bytes


class Headers:
    """The headers of a checkpoint's files, one file or many.

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
        self.range_files: dict[str, storage.RangeFile] = {}
        """by name"""
        # In threads: a store takes its time to answer, and large models have a hundred files.
        read_headers = parallel.each(files, lambda file, _: self._read_header(file))
        headers = dict(zip(files, read_headers, strict=True))

        self.tensors: dict[str, StoredTensor] = {}
        """by name"""
        for header in headers.values():
            self.tensors.update(header)
        if self.index:
            self._require_index_fits(headers)

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

    def _require_index_fits(self, headers: Mapping[str, Mapping[str, StoredTensor]]) -> None:
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

    def _read_header(self, file: str) -> dict[str, StoredTensor]:
        """Return the tensors of a file, after comparing its header with its length."""
        where = f"{self.where}/{file}"
        content = storage.RangeFile(storage.join(self._url, file))
        self.range_files[file] = content
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
) -> tuple[dict[str, StoredTensor], dict[str, int]]:
    """Return the tensors of a header, and where each one ends, in bytes of the file.

    Args:
        header: the parsed JSON.
        file: its name.
        first_byte: behind the header.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is not the header of a safetensors file.
    """
    header.pop("__metadata__", None)
    tensors: dict[str, StoredTensor] = {}
    ends: dict[str, int] = {}
    for name, entry in header.items():
        begin, end = (first_byte + _count(offset) for offset in entry["data_offsets"])
        shape = tuple(_count(size) for size in entry["shape"])
        tensors[name] = StoredTensor(_type_name(entry["dtype"]), shape, file, begin)
        ends[name] = end
    return tensors, ends


def _require_no_gaps(
    where: str,
    tensors: Mapping[str, StoredTensor],
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


def _type_name(value: Any) -> str:
    """Return the name of a type in a header.

    Raises:
        KeyError, TypeError: it is none that is known.
    """
    TYPES[value]
    return str(value)


_OLD = {
    SINGLE: ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ADAPTER: ("adapter_model.bin",),
}
"""The pickles that would stand in the place of a file."""
