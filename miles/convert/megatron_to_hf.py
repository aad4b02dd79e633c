"""Megatron `torch_dist` -> a Hugging Face checkpoint, with the names and files that it came with, tensor by tensor.

LOAD/iter_0000100/… and DIR/config.json, tokenizer.json, …   ->   SAVE/*.safetensors and the rest of DIR

Files are made at their full size; each tensor goes to its place in them, in whatever order it comes.
"""

from __future__ import annotations

import json
import posixpath
import re
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from miles.architecture.config import ModelShape
from miles.architecture.families import pieces_of, read_shape, stored_names
from miles.architecture.parameters import Parameter
from miles.common import atomic_folders, storage
from miles.common.checkpoint_tracker import RELEASE
from miles.convert import parallel, tensor_io, torch_dist
from miles.convert.mismatch import missing_tensor, unexpected_tensors, wrong_shape
from miles.convert.path_safety import require_inside
from miles.convert.safetensors_files import (
    INDEX,
    SINGLE,
    ShardedWriter,
    Spec,
    Weights,
    index_text,
    is_weights,
    split_into_files,
)
from miles.convert.torch_dist import Checkpoint
from miles.errors import CheckpointError, SourceError

MAX_SHARD_BYTES = 5_000_000_000
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|distcp)(\.index\.json)?"  # and their indices
)


def megatron_to_hf(
    load: str,
    hf_checkpoint: str,
    save: str,
    *,
    iteration: int | None = None,
    max_shard_bytes: int | None = None,
    console: Console | None = None,
) -> str:
    """Converts. Rows of padding behind the vocabulary are left out.

    Args:
        load: folder (fsspec URL) with the tracker file, or a checkpoint in it.
        hf_checkpoint: folder whose configuration, tokenizer and template files are copied. Where it holds weights, the
            tensors are written in the dtypes that they have there; otherwise in that of config.json, those of a
            checkpoint which was only converted in their own.
        save: folder (fsspec URL) to make, or one that an earlier conversion made; it appears when it is complete.
        iteration: of the checkpoint; None: the newest.
        max_shard_bytes: of a safetensors file, unless one tensor is larger; None: the files of `hf_checkpoint`, or
            where it holds no weights, 5 GB.
        console: shows a bar; None: nothing.

    Returns:
        `save`.

    Raises:
        CheckpointError: a checkpoint that is missing, incomplete, or of another model; a `save` that holds other
            things.
    """
    require_inside(hf_checkpoint, "config.json", hf_checkpoint)
    shape = read_shape(hf_checkpoint)
    require_replaceable(save, hf_checkpoint)
    try:
        url = torch_dist.newest(load, iteration)
        watch = partial(parallel.bar, console, "downloading")
        with storage.local_folder(url, "Megatron checkpoint", watch=watch) as source:
            export = _Export(Checkpoint(source, url), hf_checkpoint, shape, max_shard_bytes)
            if storage.is_local(save):
                with atomic_folders.appearing(Path(storage.filesystem(save)[1])) as folder:
                    export.write(folder, console)
            else:
                with tempfile.TemporaryDirectory(prefix="miles-convert-") as name:
                    export.write(Path(name), console)
                    storage.remove(save)
                    last = INDEX if (Path(name) / INDEX).exists() else SINGLE
                    storage.upload_folder(
                        Path(name), save, last, partial(parallel.bar, console, "uploading")
                    )
    except SourceError as error:
        raise CheckpointError(str(error)) from error
    return save


def require_replaceable(save: str, hf_checkpoint: str) -> None:
    """Refuses a folder that holds anything but what a conversion with these files writes: it would be lost.

    Raises:
        CheckpointError: names what is there.
    """
    known = {name.split("/")[0] for name in _companions(hf_checkpoint)}
    if not storage.exists(save):
        return
    if _same(save, hf_checkpoint):
        raise CheckpointError(f"{save}: is --hf-checkpoint itself: give another folder")
    stray = [name for name in storage.names(save) if name not in known and not is_weights(name)]
    if stray:
        raise CheckpointError(
            f"{save}: holds {', '.join(stray[:3])}, which no conversion of {hf_checkpoint} writes, and which would be "
            "removed: give another folder"
        )


def _same(one: str, other: str) -> bool:
    if storage.is_local(one) and storage.is_local(other):
        return (
            Path(storage.filesystem(one)[1]).resolve()
            == Path(storage.filesystem(other)[1]).resolve()
        )
    return one.rstrip("/") == other.rstrip("/")


def _companions(hf_checkpoint: str) -> list[str]:
    """The files beside the weights, as paths in the folder.

    Raises:
        CheckpointError: a link that leads out of it.
    """
    root = storage.filesystem(hf_checkpoint)[1].rstrip("/")
    names = []
    for url in storage.expand(hf_checkpoint, ("",)):
        name = posixpath.relpath(storage.filesystem(url)[1], root)
        folder, base = posixpath.split(name)
        if not _WEIGHTS.fullmatch(base):
            require_inside(
                storage.join(hf_checkpoint, folder), base, storage.join(hf_checkpoint, folder)
            )
            names.append(name)
    return names


class _Export:
    """What will be written of a checkpoint, planned before the first byte is."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        hf_checkpoint: str,
        shape: ModelShape,
        max_shard_bytes: int | None,
    ) -> None:
        differences = shape.differences(checkpoint.args)
        if differences:
            raise CheckpointError(
                f"{checkpoint.where}: a checkpoint of another model than {hf_checkpoint}: {'; '.join(differences)}"
            )
        self._checkpoint, self._hf_checkpoint, self._shape = checkpoint, hf_checkpoint, shape
        self._pieces = pieces_of(shape)
        require_complete(checkpoint, shape)
        has_weights = any(
            storage.exists(storage.join(hf_checkpoint, name)) for name in (INDEX, SINGLE)
        )
        like = Weights(hf_checkpoint) if has_weights else None
        self._tensors = self._planned(like)
        if (
            like is not None
            and max_shard_bytes is None
            and like.tensors.keys() == self._tensors.keys()
        ):
            self._files = {name: stored.file for name, stored in like.tensors.items()}
        else:
            self._files = split_into_files(self._tensors, max_shard_bytes or MAX_SHARD_BYTES)

    def write(self, folder: Path, console: Console | None) -> None:
        """Fills an empty local folder."""
        num_bytes = sum(tensor.num_bytes for tensor in self._tensors.values())
        atomic_folders.require_room(folder, num_bytes)
        with parallel.bar(console, "converting", num_bytes) as report:
            writer = ShardedWriter(folder, self._tensors, self._files)
            try:

                def convert(
                    piece: tuple[Parameter, tuple[int, ...]], report: storage.Report
                ) -> None:
                    for name, tensor in tensors_of(self._checkpoint, *piece).items():
                        for target in stored_names(name, self._shape, self._tensors):
                            writer.write(target, tensor.to(self._tensors[target].dtype))
                            report(self._tensors[target].num_bytes)

                parallel.each(self._pieces, convert, report)
                writer.sync()
            finally:
                writer.close()
        if len(set(self._files.values())) > 1:
            (folder / INDEX).write_text(index_text(self._tensors, self._files), encoding="utf-8")
        for name in _companions(self._hf_checkpoint):
            storage.copy_file(storage.join(self._hf_checkpoint, name), folder / name)

    def _planned(self, like: Weights | None) -> dict[str, Spec]:
        stored = {} if like is None else like.tensors
        default = (
            None
            if posixpath.basename(self._checkpoint.where) == RELEASE
            else _config_dtype(self._hf_checkpoint)
        )
        planned = {}
        for parameter, place in self._pieces:
            own = self._checkpoint.tensors[parameter.megatron].properties.dtype
            for name, sizes in zip(parameter.hf_names(place), parameter.shapes, strict=True):
                spec = Spec(stored[name].dtype if name in stored else default or own, sizes)
                planned.update(dict.fromkeys(stored_names(name, self._shape, stored), spec))
        return planned


def _config_dtype(hf_checkpoint: str) -> torch.dtype | None:
    config: Mapping[str, str] = json.loads(
        storage.read_text(storage.join(hf_checkpoint, "config.json"))
    )
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return dtype if isinstance(dtype, torch.dtype) else None


def require_complete(checkpoint: Checkpoint, shape: ModelShape) -> None:
    """Refuses a Megatron checkpoint whose tensors are not those of a shape.

    Raises:
        CheckpointError: names the tensor that is missing, unexpected, or of another shape.
    """
    wanted = {parameter.megatron: parameter for parameter, _ in pieces_of(shape)}
    for key, parameter in wanted.items():
        if key not in checkpoint.tensors:
            raise missing_tensor(checkpoint.where, key)
        found = tuple(checkpoint.tensors[key].size)
        stack = parameter.stack(shape)
        rows = found[len(stack)] if len(found) > len(stack) else 0
        sizes = parameter.shape
        if parameter.is_vocabulary and rows > sizes[0]:  # of padding
            sizes = (rows, *sizes[1:])
        if found != (*stack, *sizes):
            raise wrong_shape(checkpoint.where, key, found, (*stack, *parameter.shape))
    extra = sorted(set(checkpoint.tensors) - set(wanted))
    if extra:
        raise unexpected_tensors(checkpoint.where, extra)


def tensors_of(
    checkpoint: Checkpoint, parameter: Parameter, place: tuple[int, ...]
) -> dict[str, Tensor]:
    """The Hugging Face tensors of one parameter at one place, by name, until the thread asks for others."""
    dtype = checkpoint.tensors[parameter.megatron].properties.dtype
    whole = tensor_io.buffer("whole", (*(1 for _ in place), *parameter.shape), dtype)
    checkpoint.read(parameter.megatron, (*place, *(0 for _ in parameter.shape)), whole)
    parts = parameter.layout(whole.view(parameter.shape))
    tensors = {}
    for number, (name, part, sizes) in enumerate(
        zip(parameter.hf_names(place), parts, parameter.shapes, strict=True)
    ):
        flat = (
            part
            if part.is_contiguous()
            else tensor_io.buffer(f"part {number}", part.shape, dtype).copy_(part)
        )
        tensors[name] = flat.view(sizes)
    return tensors
