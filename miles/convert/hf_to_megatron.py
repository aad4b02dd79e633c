"""A Hugging Face checkpoint -> Megatron `torch_dist`, readable at any layout, tensor by tensor.

DIR/config.json, *.safetensors   ->   SAVE/release/…, SAVE/latest_checkpointed_iteration.txt ("release", last)

Everything is planned from the headers of the files, and refused there; only then is the first byte written.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from miles.architecture.config import ModelShape
from miles.architecture.families import TIED_COPY, TIED_TO, pieces_of, read_shape
from miles.architecture.parameters import Parameter
from miles.architecture.sizes import padded_vocab_size
from miles.common import atomic_folders, storage
from miles.common.checkpoint_tracker import RELEASE, TRACKER, tracked
from miles.convert import parallel, tensor_io, torch_dist
from miles.convert.mismatch import missing_tensor, unexpected_tensors, wrong_shape
from miles.convert.path_safety import require_inside
from miles.convert.safetensors_files import Weights, is_weights
from miles.convert.torch_dist import Box
from miles.errors import CheckpointError, SourceError

MAX_FILE_BYTES = 4 << 30


def hf_to_megatron(
    hf_checkpoint: str,
    save: str,
    *,
    make_vocab_size_divisible_by: int = 1,
    console: Console | None = None,
) -> str:
    """Converts. Tensors keep their dtype.

    Args:
        hf_checkpoint: folder (fsspec URL) with config.json and safetensors.
        save: folder (fsspec URL) to make, or one that an earlier conversion made.
        make_vocab_size_divisible_by: rows of zeros are added to the embedding and the output layer, up to the next
            multiple; 1: none. What loads the checkpoint must have the same number of rows, or ignore those behind.
        console: shows a bar; None: nothing.

    Returns:
        the checkpoint's folder, `SAVE/release`.

    Raises:
        CheckpointError: names the file and tensor that is missing, unexpected, or of another shape.
    """
    require_inside(hf_checkpoint, "config.json", hf_checkpoint)
    shape = read_shape(hf_checkpoint)
    padded = padded_vocab_size(shape, make_vocab_size_divisible_by)
    named, _ = tracked(save) or (RELEASE, 0)
    if named != RELEASE:
        raise CheckpointError(
            f"{save}: holds the checkpoints of a run ({TRACKER} names {named}): give another folder"
        )
    try:
        watch = partial(parallel.bar, console, "downloading")
        with storage.local_folder(
            hf_checkpoint, "Hugging Face checkpoint", is_weights, watch
        ) as source:
            weights = Weights(str(source), hf_checkpoint)
            boxes = _plan(weights, shape, padded)
            args = shape.checkpoint_args(padded_vocab_size=padded)
            if storage.is_local(save):
                root = Path(storage.filesystem(save)[1])
                with atomic_folders.appearing(root / RELEASE) as folder:
                    _write(folder, boxes, args, console)
                    (root / TRACKER).unlink(missing_ok=True)  # of the one that is replaced
                storage.write_text(str(root / TRACKER), RELEASE)
            else:
                with tempfile.TemporaryDirectory(prefix="miles-convert-") as name:
                    root = Path(name)
                    (root / RELEASE).mkdir()
                    _write(root / RELEASE, boxes, args, console)
                    storage.write_text(str(root / TRACKER), RELEASE)
                    storage.remove(storage.join(save, TRACKER))
                    storage.remove(storage.join(save, RELEASE))
                    storage.upload_folder(
                        root, save, TRACKER, partial(parallel.bar, console, "uploading")
                    )
    except SourceError as error:
        raise CheckpointError(str(error)) from error
    return storage.join(save, RELEASE)


def _plan(weights: Weights, shape: ModelShape, padded_vocab_size: int) -> list[Box]:
    """What will be written, in the order of the model."""
    taken: set[str] = set()
    of_key: dict[str, tuple[str, torch.dtype]] = {}
    boxes = []
    for parameter, place in pieces_of(shape):
        names = parameter.hf_names(place)
        for name, wanted in zip(names, parameter.shapes, strict=True):
            stored = weights.tensors.get(name)
            if stored is None:
                raise missing_tensor(weights.where, name)
            if stored.shape != wanted:
                raise wrong_shape(f"{weights.where}/{stored.file}", name, stored.shape, wanted)
            first, dtype = of_key.setdefault(parameter.megatron, (name, stored.dtype))
            if stored.dtype != dtype:
                raise CheckpointError(
                    f"{weights.where}/{stored.file}: tensor {name} is {stored.dtype}, {first} {dtype}: Megatron keeps "
                    f"them in one tensor, {parameter.megatron}, of one dtype"
                )
        taken.update(names)
        num_rows = padded_vocab_size if parameter.is_vocabulary else parameter.shape[0]
        sizes, stack = (num_rows, *parameter.shape[1:]), parameter.stack(shape)
        boxes.append(
            Box(
                key=parameter.megatron,
                offsets=(*place, *(0 for _ in sizes)),
                sizes=(*(1 for _ in stack), *sizes),
                size=(*stack, *sizes),
                dtype=of_key[parameter.megatron][1],
                make=partial(_make, weights, parameter, names, num_rows),
            )
        )
    extra = sorted(set(weights.tensors) - taken)
    if shape.tied_embeddings and TIED_COPY in extra:
        _require_copy(weights)
        extra.remove(TIED_COPY)
    if extra:
        raise unexpected_tensors(f"{weights.where}/{weights.tensors[extra[0]].file}", extra)
    return boxes


def _require_copy(weights: Weights) -> None:
    """A model whose output layer is its embedding may store it twice; not as two tensors."""
    copy, original = (
        weights.read(
            name, torch.empty(weights.tensors[name].shape, dtype=weights.tensors[name].dtype)
        )
        for name in (TIED_COPY, TIED_TO)
    )
    if not torch.equal(copy, original):
        raise CheckpointError(
            f"{weights.where}/{weights.tensors[TIED_COPY].file}: tensor {TIED_COPY} differs from {TIED_TO}, which "
            "config.json says it is (tie_word_embeddings)"
        )


def _make(weights: Weights, parameter: Parameter, names: Sequence[str], num_rows: int) -> Tensor:
    dtype = weights.tensors[names[0]].dtype
    whole = tensor_io.buffer("whole", (num_rows, *parameter.shape[1:]), dtype)
    for name, part in zip(names, parameter.layout(whole[: parameter.shape[0]]), strict=True):
        if part.is_contiguous():
            weights.read(name, part)
        else:
            part.copy_(weights.read(name, tensor_io.buffer("part", part.shape, dtype)))
    whole[parameter.shape[0] :].zero_()
    return whole


def _write(
    folder: Path, boxes: Sequence[Box], args: argparse.Namespace, console: Console | None
) -> None:
    num_bytes = sum(box.num_bytes for box in boxes)
    atomic_folders.require_room(folder, num_bytes)
    max_bytes = min(MAX_FILE_BYTES, -(-num_bytes // parallel.NUM_THREADS))
    files = parallel.grouped(boxes, lambda box: box.num_bytes, max_bytes)
    with parallel.bar(console, "converting", num_bytes) as report, torch_dist.without_checksums():

        def write(number: int, report: storage.Report) -> list[tuple[Box, torch_dist.Place]]:
            places = torch_dist.write_boxes(folder, f"__0_{number}.distcp", files[number], report)
            return list(zip(files[number], places, strict=True))

        places = [
            place for part in parallel.each(range(len(files)), write, report) for place in part
        ]
    torch_dist.write_metadata(folder, places, args)
