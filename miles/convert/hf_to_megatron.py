"""A Hugging Face checkpoint -> Megatron `torch_dist`, readable at any layout.

DIR/config.json, *.safetensors   ->   SAVE/release/…, SAVE/latest_checkpointed_iteration.txt ("release", last)
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from miles import storage
from miles.architecture import ModelShape
from miles.convert import torch_dist
from miles.errors import CheckpointError, SourceError


def hf_to_megatron(hf_checkpoint: str, save: str) -> str:
    """Converts. Tensors keep their dtype; nothing is padded.

    Args:
        hf_checkpoint: folder (fsspec URL) with config.json and safetensors.
        save: folder (fsspec URL) to make or add to.

    Returns:
        the checkpoint's folder, `SAVE/release`.

    Raises:
        CheckpointError: names the file and tensor that is missing, unexpected, or of another shape.
    """
    shape = ModelShape.from_hf_folder(hf_checkpoint)
    try:
        with storage.local_folder(hf_checkpoint, "Hugging Face checkpoint") as source:
            if storage.is_local(save):
                _write(source, Path(storage.filesystem(save)[1]), shape, hf_checkpoint)
            else:
                with tempfile.TemporaryDirectory(prefix="miles-convert-") as staged:
                    _write(source, Path(staged), shape, hf_checkpoint)
                    storage.upload_folder(Path(staged), save, last=torch_dist.TRACKER)
    except SourceError as error:
        raise CheckpointError(str(error)) from error
    return storage.join(save, "release")


def _write(source: Path, target: Path, shape: ModelShape, where: str) -> None:
    from megatron.core import dist_checkpointing

    tensors = _Tensors(source, where)
    model: dict[str, Any] = {}
    for parameter in torch_dist.parameters_of(shape):
        for place in torch_dist.places_of(parameter, shape):
            names = parameter.hf_names(place)
            parts = [tensors.take(name, wanted) for name, wanted in zip(names, parameter.shapes, strict=True)]
            model[f"{parameter.megatron} {place}"] = torch_dist.sharded(
                parameter, place, parameter.layout.fuse(parts).contiguous(), shape
            )
    tensors.require_all_taken(ignore=("lm_head.weight",) if shape.tied_embeddings else ())
    args = argparse.Namespace(
        **shape.megatron_args(),
        miles_model_type=shape.model_type,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        expert_model_parallel_size=1,
        ckpt_format="torch_dist",
        tokenizer_type="HuggingFaceTokenizer",
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
    )
    (target / torch_dist.TRACKER).unlink(missing_ok=True)  # until all is written, nothing here is complete
    shutil.rmtree(target / "release", ignore_errors=True)
    (target / "release").mkdir(parents=True)
    with torch_dist.single_rank():
        dist_checkpointing.save(
            {"model": model, "args": args, "checkpoint_version": 3.0, "iteration": 0}, str(target / "release")
        )
    storage.write_text(str(target / torch_dist.TRACKER), "release")


class _Tensors:
    """The tensors of a safetensors checkpoint, one file or many, read one by one."""

    def __init__(self, folder: Path, where: str) -> None:
        self._where, self._taken = where, set[str]()
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            listed: dict[str, str] = json.loads(index.read_text())["weight_map"]
            for tensor, name in listed.items():
                if (folder / name).resolve().parent != folder.resolve():
                    raise CheckpointError(f"{where}: the index puts {tensor} into {name}, outside the folder")
            files = sorted(set(listed.values()))
        else:
            files = ["model.safetensors"]
        for name in files:
            if not (folder / name).is_file():
                raise CheckpointError(f"{where}/{name}: no such file; expected the model's safetensors")
            try:
                self._files[name] = safe_open(folder / name, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"{where}/{name}: truncated or not a safetensors file ({error})") from error
            self._file_of.update(dict.fromkeys(self._files[name].keys(), name))

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._file_of:
            raise CheckpointError(f"{self._where}: tensor {name} is missing; config.json asks for it")
        tensor: Tensor = self._files[self._file_of[name]].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self._where}/{self._file_of[name]}: tensor {name} has shape {tuple(tensor.shape)}; config.json "
                f"asks for {shape}"
            )
        self._taken.add(name)
        return tensor

    def require_all_taken(self, ignore: tuple[str, ...]) -> None:
        extra = sorted(set(self._file_of) - self._taken - set(ignore))
        if extra:
            raise CheckpointError(
                f"{self._where}: {len(extra)} tensors that config.json knows nothing of: {', '.join(extra[:5])}"
            )
