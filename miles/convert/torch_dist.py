"""Megatron's `torch_dist` folders, read and written tensor by tensor.

No Megatron and no process group is needed.

    FOLDER/latest_checkpointed_iteration.txt   "release" or an iteration: the newest checkpoint
    FOLDER/release/ or FOLDER/iter_0000100/
        metadata.json                          marks a `torch_dist` checkpoint
        common.pt                              args, checkpoint_version, iteration; with
                                               megatron-core 0.19 an object among the boxes
        .metadata                              the place of each box of each tensor
        __0_0.distcp, …                        the boxes, each as `torch.save` writes it

A tensor of a layer is a box of one row in a tensor that is stacked by layers: [1, rows, columns] at
[layer, 0, 0]. Beside the boxes lie objects, one for each module that may keep the scaling of FP8
(`…._extra_state`). They are written empty, and never read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from miles.architecture.parameters import EMBEDDING, EXPERTS_NORM, FUSED_NORM, OUTPUT_LAYER
from miles.common import safe_pickle, storage
from miles.common.checkpoint_choice import ways_to_read
from miles.common.checkpoint_files import MARK, is_complete, missing_files, named_missing
from miles.common.checkpoint_tracker import TRACKER, folder_name, tracked
from miles.common.file_errors import in_own_words
from miles.common.near_names import meant_path
from miles.convert import tensor_io
from miles.convert.path_safety import require_inside
from miles.errors import CheckpointError, WriteError

CHECKPOINT_VERSION = 3.0
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""Content of metadata.json."""
_MODEL = ("embedding.", "decoder.", "output_layer.")
"""The names of a `GPTModel`'s tensors begin with these; others are those of an optimizer."""
_COMMON_OBJECT = "common_state/shard_0_1"
"""The key of the common part in checkpoints of megatron-core 0.19, which have no common.pt."""
VOCABULARY = (EMBEDDING, OUTPUT_LAYER)
"""The tensors with a row for each token, and maybe rows of padding behind them."""
_MALFORMED = (AttributeError, TypeError, KeyError, IndexError, ValueError)
"""The errors of torch's own records that are not put together as torch does it."""


Place: TypeAlias = _StorageInfo
"""File, first byte and number of bytes of a box, as `.metadata` holds them."""


def newest(url: str, iteration: int | None = None) -> str:
    """Return the URL of a complete checkpoint.

    Args:
        url: the folder with the tracker, or a checkpoint itself.
        iteration: of the checkpoint; None: the one that the tracker names.

    Raises:
        CheckpointError: there is none.
    """
    if not storage.exists(url):
        raise CheckpointError(
            f"{url}: no such folder: give one with Megatron checkpoints{meant_path(url)}"
        )

    by_step = iteration is not None
    try:
        named = (folder_name(iteration), iteration) if iteration is not None else tracked(url)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {ways_to_read(url, by_step=by_step)}") from error
    if named is None:
        if is_complete(url):
            return url
        raise CheckpointError(
            f"{url}: no Megatron checkpoint there: {TRACKER} is missing. "
            f"{ways_to_read(url, by_step=by_step)}"
        )

    require_inside(url, named[0], url)
    checkpoint = storage.join(url, named[0])
    missing = missing_files(checkpoint)
    if missing:
        reason = "" if by_step else f", which {TRACKER} names"
        raise CheckpointError(
            f"{checkpoint}{reason}: not there, or not complete ({named_missing(missing)}). "
            f"{ways_to_read(url, by_step=by_step)}"
        )
    return checkpoint


class Checkpoint:
    """One checkpoint of a local folder.

    Args:
        folder: local.
        where: names it in errors.

    Raises:
        CheckpointError: it is not complete, or its files lie elsewhere.
    """

    def __init__(self, folder: Path, where: str) -> None:
        self.where = where
        self._folder = folder

        for path in folder.iterdir():
            require_inside(str(folder), path.name, where)
        safe_pickle.require_plain(folder, where)

        self._reader = FileSystemReader(folder)
        try:
            self._metadata: Metadata = self._reader.read_metadata()
            self._require_files()
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            self.tensors: dict[str, TensorStorageMetadata] = {
                key: stored
                for key, stored in self._metadata.state_dict_metadata.items()
                if key.startswith(_MODEL) and isinstance(stored, TensorStorageMetadata)
            }
            """the model's tensors, by key"""
            self._stored_keys = _take_second_keys(self.tensors)
            self._chunks = {key: _by_first(stored) for key, stored in self.tensors.items()}
        except _MALFORMED as error:
            raise CheckpointError(
                f"{where}/.metadata: not that of a torch_dist checkpoint ({error!r})"
            ) from error

        place = self._metadata.storage_data.get(MetadataIndex(_COMMON_OBJECT))
        self.args = _read_args(folder, place, where)
        """`args` of the common part; empty where it has none"""

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes of the model's tensors, by key."""
        return {key: stored.properties.dtype for key, stored in self.tensors.items()}

    def read(self, key: str, offsets: Sequence[int], target: Tensor) -> Tensor:
        """Fill a tensor with a box of a stored one, from all stored boxes that hold parts of it.

        Args:
            key: of the stored tensor.
            offsets: where the box begins.
            target: the tensor to fill; its shape is that of the box.

        Returns:
            `target`.

        Raises:
            CheckpointError: a part of the box is not stored.
        """
        stored = self.tensors[key]
        by_first = self._chunks[key]
        key = self._stored_keys.get(key, key)
        sizes = tuple(target.shape)
        if by_first is not None and sizes[0] == 1:
            stored = TensorStorageMetadata(
                stored.properties, stored.size, by_first.get(offsets[0], [])
            )
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        if box in stored.chunks and self._fill(target, MetadataIndex(key, box.offsets)):
            return target

        items = create_read_items_for_chunk_list(key, stored, [box])
        if sum(math.prod(item.lengths) for item in items) != math.prod(sizes):
            raise CheckpointError(
                f"{self.where}: tensor {key} is incomplete: parts of {list(sizes)} are not stored"
            )

        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except Exception as error:  # a box is a zip file with a pickle: each has errors of its own
            stored_at = (self._metadata.storage_data.get(item.storage_index) for item in items)
            files = sorted({info.relative_path for info in stored_at if info is not None})
            raise CheckpointError(
                f"{self.where}/{', '.join(files)}: tensor {key} cannot be read "
                f"({type(error).__name__}: {error})"
            ) from error
        return target

    def _fill(self, target: Tensor, index: MetadataIndex) -> bool:
        """Fill a tensor with the bytes of a stored box.

        Returns:
            whether that was possible: not where the box holds its values in another order.
        """
        try:
            info = self._metadata.storage_data[index]
            with open(self._folder / info.relative_path, "rb") as file:
                # No bytes of the tensor are read here, only what they mean and where they begin.
                part = _Part(file, info.offset, info.length)
                box = torch.load(part, map_location="meta", weights_only=True)
                begin = box.untyped_storage()._checkpoint_offset

                is_alike = (box.dtype, box.shape) == (target.dtype, target.shape)
                if begin is None or not is_alike or not box.is_contiguous():
                    return False

                first_byte = info.offset + begin + box.storage_offset() * box.itemsize
                tensor_io.fill(target, file.fileno(), first_byte)
                return True
        except Exception:  # whatever is wrong, reading it as usual will say
            return False

    def _require_files(self) -> None:
        """Refuse a `.metadata` that names files which are missing, elsewhere, or too short."""
        sizes: dict[str, int] = {}
        for index, info in self._metadata.storage_data.items():
            name = info.relative_path
            if name not in sizes:
                require_inside(str(self._folder), name, f"{self.where}: tensor {index.fqn}")
                path = self._folder / name
                if not path.is_file():
                    raise CheckpointError(
                        f"{self.where}/{name}: no such file; tensor {index.fqn} is in it"
                    )
                sizes[name] = path.stat().st_size

            if info.offset + info.length > sizes[name]:
                raise CheckpointError(
                    f"{self.where}/{name}: truncated: tensor {index.fqn} ends at byte "
                    f"{info.offset + info.length:,}, the file at {sizes[name]:,}"
                )


class _Part(storage.Ranges):
    """Some bytes of an open file, as a file."""

    def __init__(self, file: BinaryIO, first_byte: int, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self._file = file
        self._first_byte = first_byte

    def read_range(self, begin: int, end: int) -> bytes:
        self._file.seek(self._first_byte + begin)
        return self._file.read(max(0, end - begin))


class _Into(DefaultLoadPlanner):
    """Puts all that is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._target


def _take_second_keys(tensors: dict[str, TensorStorageMetadata]) -> dict[str, str]:
    """Give each tensor the key that the parameter maps have for it.

    Args:
        tensors: of a checkpoint, by key; altered. A tensor that is stored twice is left once.

    Returns:
        key of the maps -> the key in the checkpoint, where it is another.
    """
    stored = tensors.pop(EXPERTS_NORM, None)
    if stored is None or FUSED_NORM in tensors:
        return {}
    tensors[FUSED_NORM] = stored
    return {FUSED_NORM: EXPERTS_NORM}


def _by_first(stored: TensorStorageMetadata) -> dict[int, list[ChunkStorageMetadata]] | None:
    """Return the boxes of a stacked tensor by layer; None where a box spans several layers.

    So a layer's boxes are found without looking at all.
    """
    if any(chunk.sizes[0] != 1 for chunk in stored.chunks):
        return None
    by_first: dict[int, list[ChunkStorageMetadata]] = {}
    for chunk in stored.chunks:
        by_first.setdefault(chunk.offsets[0], []).append(chunk)
    return by_first


def _load_common(folder: Path, place: Place | None) -> Any:
    """Load the common part from its file, or from where it lies among the tensors."""
    file = folder / "common.pt"
    if place is None or file.exists():
        return torch.load(file, weights_only=True)
    with open(folder / place.relative_path, "rb") as boxes:
        (common,) = torch.load(_Part(boxes, place.offset, place.length), weights_only=True)
    return common


def _read_args(folder: Path, place: Place | None, where: str) -> dict[str, Any]:
    """Return `args` of a checkpoint's common part.

    Only plain values and Megatron's own enumerations are unpickled.

    Args:
        place: of `_COMMON_OBJECT`, which is read where there is no common.pt.
    """
    # Not the context manager: on leaving, it would take the class away from Megatron's loader, too.
    torch.serialization.add_safe_globals([argparse.Namespace])

    try:
        try:
            common = _load_common(folder, place)
        except pickle.UnpicklingError:
            with warnings.catch_warnings():
                # The warnings are about Apex and Transformer Engine, which play no part here.
                warnings.simplefilter("ignore")
                # Its import marks what Megatron-LM keeps in its arguments as safe.
                import megatron.core  # noqa: F401
            common = _load_common(folder, place)
    except Exception as error:  # a zip file with a pickle: each has errors of its own
        raise CheckpointError(f"{where}/common.pt: cannot be read ({error})") from error
    return dict(vars(common["args"])) if "args" in common else {}


@dataclass(frozen=True)
class Box:
    """A part of a tensor, to be written."""

    key: str
    """of the tensor"""
    offsets: tuple[int, ...]
    """where the part begins"""
    sizes: tuple[int, ...]
    """of the part"""
    size: tuple[int, ...]
    """of the whole tensor"""
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """returns the part's content, in any shape"""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


@contextlib.contextmanager
def without_checksums() -> Iterator[None]:
    """Have `torch.save` compute no CRC32 in the context.

    That takes most of the time, and `torch.load` looks at none.
    """
    is_computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(is_computed)


def write_boxes(
    folder: Path, name: str, boxes: Sequence[Box], report: storage.Report
) -> list[Place]:
    """Write one file of boxes.

    Args:
        name: of the file, such as `__0_0.distcp`.
        report: is given the bytes of each box.

    Returns:
        where each box lies, for `write_metadata`.

    Raises:
        WriteError: the disk is full.
        OSError: the same, reported by the system; it names the file.
    """
    places: list[Place] = []
    path = folder / name
    try:
        with open(path, "xb") as file:
            for box in boxes:
                begin = file.tell()
                torch.save(box.make().view(box.sizes), file)
                file.flush()
                # Linux then begins to write these bytes: less is left to wait for at the end.
                os.posix_fadvise(file.fileno(), begin, file.tell() - begin, os.POSIX_FADV_DONTNEED)
                places.append(Place(name, begin, file.tell() - begin))
                report(box.num_bytes)

            _sync(file)
    except RuntimeError as error:  # torch's name for an error of the disk
        raise WriteError(
            f"{path}: cannot be written; is the disk full? ({in_own_words(error)})"
        ) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return places


def write_empty_object(folder: Path, name: str) -> Place:
    """Write a file with the one content of all extra states, and return where it lies.

    It is Megatron's own for a module without any. Transformer Engine reads it as no scaling.
    """
    with open(folder / name, "xb") as file:
        torch.save([None], file)
        _sync(file)
        return Place(name, 0, file.tell())


def write_metadata(
    folder: Path,
    places: Sequence[tuple[Box, Place]],
    args: argparse.Namespace,
    objects: Mapping[str, Place] = MappingProxyType({}),
) -> None:
    """Write the three files that make a folder of boxes a checkpoint.

    Args:
        places: each box, and where it lies (`write_boxes`).
        args: of the common part.
        objects: key of each object, and where it lies (`write_empty_object`).
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    for box, _ in places:
        if box.key not in tensors:
            tensors[box.key] = TensorStorageMetadata(
                TensorProperties(box.dtype), torch.Size(box.size), []
            )
        tensors[box.key].chunks.append(
            ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
        )

    stored = {MetadataIndex(box.key, torch.Size(box.offsets)): info for box, info in places}
    stored |= {MetadataIndex(key): place for key, place in objects.items()}
    kinds = {**tensors, **dict.fromkeys(objects, BytesStorageMetadata())}
    with open(folder / ".metadata", "xb") as file:
        pickle.dump(Metadata(kinds, planner_data=None, storage_data=stored), file)
        _sync(file)
    with open(folder / "common.pt", "xb") as file:
        torch.save({"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": 0}, file)
        _sync(file)
    with open(folder / MARK, "x", encoding="utf-8") as text:
        json.dump(BACKEND, text)
        _sync(text)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
