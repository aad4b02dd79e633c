"""Megatron `torch_dist` -> a Hugging Face checkpoint, with the names and files that it came with."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from miles import pickles, storage
from miles.architecture import ModelShape
from miles.convert import torch_dist
from miles.errors import CheckpointError, SourceError

SHARD_BYTES = 5 << 30
INDEX = "model.safetensors.index.json"


def megatron_to_hf(load: str, hf_checkpoint: str, save: str) -> str:
    """Converts the newest complete checkpoint of a folder.

    Args:
        load: folder (fsspec URL) with the tracker file.
        hf_checkpoint: folder whose configuration, tokenizer and template files are copied; its `dtype` is
            the one that the weights are written in.
        save: folder (fsspec URL) to make; it appears when it is complete.

    Returns:
        `save`.

    Raises:
        CheckpointError: a checkpoint that is missing, incomplete, or of another model.
    """
    shape = ModelShape.from_hf_folder(hf_checkpoint)
    try:
        with (
            storage.local_folder(load, "Megatron checkpoint") as source,
            storage.local_folder(hf_checkpoint, "Hugging Face checkpoint") as like,
        ):
            if storage.is_local(save):
                target = Path(storage.filesystem(save)[1])
                target.parent.mkdir(parents=True, exist_ok=True)
                staged = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
                try:
                    _write(torch_dist.newest(source, load), like, staged, shape, load)
                    shutil.rmtree(target, ignore_errors=True)
                    staged.chmod(0o755)
                    staged.rename(target)
                finally:
                    shutil.rmtree(staged, ignore_errors=True)
            else:
                with tempfile.TemporaryDirectory(prefix="miles-convert-") as folder:
                    _write(torch_dist.newest(source, load), like, Path(folder), shape, load)
                    storage.upload_folder(Path(folder), save, last="config.json")
    except SourceError as error:
        raise CheckpointError(str(error)) from error
    return save


def _write(checkpoint: Path, like: Path, target: Path, shape: ModelShape, where: str) -> None:
    differences = shape.differences(torch_dist.read_args(checkpoint))
    if differences:
        raise CheckpointError(f"{where}: a checkpoint of another model than {like}: {'; '.join(differences)}")
    config = json.loads((like / "config.json").read_text())
    dtype = config.get("dtype") or config.get("torch_dtype")
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in _tensors(checkpoint, shape, where):
        tensor = tensor.to(getattr(torch, dtype)) if dtype else tensor
        if shards[-1] and _bytes(shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor.contiguous()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, target / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    if len(shards) > 1:
        total = sum(_bytes(shard) for shard in shards)
        (target / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
    for file in sorted(like.iterdir()):
        if file.is_file() and not file.name.endswith(".safetensors") and file.name != INDEX:
            shutil.copyfile(file, target / file.name)


def _bytes(shard: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in shard.values())


def _tensors(checkpoint: Path, shape: ModelShape, where: str) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors, by name."""
    from megatron.core import dist_checkpointing

    with torch_dist.single_rank():
        pickles.require_plain(checkpoint, f"{where}/{checkpoint.name}")
        stored: dict[str, Any] = dist_checkpointing.load_tensors_metadata(str(checkpoint))
        for parameter in torch_dist.parameters_of(shape):
            if parameter.megatron not in stored:
                raise CheckpointError(f"{where}: tensor {parameter.megatron} is missing")
            found = tuple(stored[parameter.megatron].global_shape)
            wanted = (*parameter.stack(shape), *parameter.shape)
            if found != wanted:
                raise CheckpointError(f"{where}: tensor {parameter.megatron} has shape {found}, expected {wanted}")
            places = list(torch_dist.places_of(parameter, shape))
            dtype = stored[parameter.megatron].dtype
            state = {
                str(place): torch_dist.sharded(parameter, place, torch.empty(parameter.shape, dtype=dtype), shape)
                for place in places
            }
            loaded = dist_checkpointing.load(state, str(checkpoint))
            for place in places:
                parts = parameter.layout.split(loaded[str(place)])
                for name, part in zip(parameter.hf_names(place), parts, strict=True):
                    yield name, part.clone()
