"""Two checkpoints, of either format, compared tensor by tensor.

One tensor of each is in memory at a time. They are compared:

Hugging Face   Hugging Face   by the names of their tensors
Megatron       Megatron       by the keys of the model's tensors; the optimizer's are left out
Hugging Face   Megatron       by the names of Hugging Face, through the family's parameter map
an adapter     an adapter     by the names of PEFT (`verify_adapters`)
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from rich.console import Console
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from miles.architecture.config import ModelShape
from miles.architecture.families import (
    hf_shapes,
    parameters_of,
    pieces_of,
    read_shape,
    stored_names,
)
from miles.architecture.parameters import Parameter
from miles.common import storage
from miles.common.checkpoint_files import MARK
from miles.common.checkpoint_tracker import TRACKER
from miles.common.debugging import unchained
from miles.convert import parallel, tensor_io, torch_dist
from miles.convert.differences import (
    Comparison,
    Difference,
    difference_of,
    kind_difference,
    only_in,
)
from miles.convert.megatron_boxes import MegatronTensors, tensors_of
from miles.convert.safetensors_files import Weights, is_weights
from miles.convert.safetensors_headers import INDEX, SINGLE
from miles.convert.torch_dist import Checkpoint
from miles.convert.verify_adapters import are_adapters, compare_adapters
from miles.errors import CheckpointError, SourceError


@unchained
def verify(one: str, other: str, *, console: Console | None = None) -> Comparison:
    """Compare names, shapes, dtypes and every bit.

    Args:
        one, other: folders (fsspec URLs): a Hugging Face checkpoint, a folder of Megatron
            checkpoints, whose newest is taken, or one of these; or an adapter, in PEFT's format or
            a LoRA run's.
        console: shows a bar; None: nothing is shown.

    Raises:
        CheckpointError: a checkpoint that cannot be read, two of different models, or an adapter
            and a model.
    """
    try:
        if are_adapters(one, other):
            return compare_adapters(one, other, console)
        with _opened(one, console) as a, _opened(other, console) as b:
            if isinstance(a, Weights) and isinstance(b, Weights):
                return _compare_weights(a, b, console)
            if isinstance(a, Checkpoint) and isinstance(b, Checkpoint):
                return _compare_checkpoints(a, b, console)
            if isinstance(a, Weights) and isinstance(b, Checkpoint):
                return _compare_formats(a, b, read_shape(one), console, is_weights_first=True)

            assert isinstance(a, Checkpoint)
            assert isinstance(b, Weights)
            return _compare_formats(b, a, read_shape(other), console, is_weights_first=False)
    except SourceError as error:
        raise CheckpointError(str(error)) from error


@contextlib.contextmanager
def _opened(url: str, console: Console | None) -> Iterator[Weights | Checkpoint]:
    """Open a checkpoint of either format. A remote one is downloaded while the context lasts."""
    watch = partial(parallel.bar, console, "downloading")
    if _has_one_of(url, TRACKER, MARK):
        checkpoint_url = torch_dist.newest(url)
        with storage.local_folder(checkpoint_url, "Megatron checkpoint", watch=watch) as folder:
            yield Checkpoint(folder, checkpoint_url)
    elif _has_one_of(url, INDEX, SINGLE):
        with storage.local_folder(url, "checkpoint", is_weights, watch) as folder:
            yield Weights(str(folder), url)
    else:
        raise CheckpointError(
            f"{url}: neither a Megatron checkpoint ({TRACKER}, {MARK}) nor one of Hugging "
            f"Face ({SINGLE}, {INDEX})"
        )


def _has_one_of(url: str, *names: str) -> bool:
    return any(storage.exists(storage.join(url, name)) for name in names)


def _compare_weights(a: Weights, b: Weights, console: Console | None) -> Comparison:
    """Compare two Hugging Face checkpoints by the names of their tensors."""
    names = sorted(set(a.tensors) | set(b.tensors))

    def compare(name: str, report: storage.Report) -> Difference | None:
        if name not in a.tensors or name not in b.tensors:
            return only_in(name, a.where if name in a.tensors else b.where)
        difference = difference_of(name, _read(a, name, "first"), _read(b, name, "second"))
        report(a.tensors[name].num_bytes)
        return difference

    with parallel.bar(console, "comparing", a.num_bytes) as report:
        results = parallel.each(names, compare, report)
    return Comparison(len(names), a.num_bytes, tuple(filter(None, results)))


def _compare_checkpoints(a: Checkpoint, b: Checkpoint, console: Console | None) -> Comparison:
    """Compare two Megatron checkpoints, box by box as the first one stores them.

    Rows of padding behind the vocabulary do not count: the checkpoints may have other numbers of
    them.
    """
    keys = sorted(set(a.tensors) | set(b.tensors))
    lone = [key for key in keys if key not in a.tensors or key not in b.tensors]
    differences = [only_in(key, a.where if key in a.tensors else b.where) for key in lone]

    boxes: list[tuple[str, ChunkStorageMetadata]] = []
    for key in sorted(set(keys) - set(lone)):
        mine = a.tensors[key]
        yours = b.tensors[key]
        num_rows = _num_token_rows(a, b, key)
        text = kind_difference(
            (num_rows, *mine.size[1:]),
            mine.properties.dtype,
            (_num_token_rows(b, a, key), *yours.size[1:]),
            yours.properties.dtype,
        )
        if text:
            differences.append(Difference(key, text))
        else:
            boxes += [(key, chunk) for chunk in _within_rows(mine.chunks, num_rows)]

    def read(checkpoint: Checkpoint, key: str, chunk: ChunkStorageMetadata, use: str) -> Tensor:
        dtype = checkpoint.tensors[key].properties.dtype
        return checkpoint.read(key, chunk.offsets, tensor_io.buffer(use, chunk.sizes, dtype))

    def compare(box: tuple[str, ChunkStorageMetadata], report: storage.Report) -> Difference | None:
        key, chunk = box
        mine = read(a, key, chunk, "first")
        yours = read(b, key, chunk, "second")
        report(mine.nbytes)
        return difference_of(f"{key} at {list(chunk.offsets)}", mine, yours)

    num_bytes = sum(
        stored.size.numel() * stored.properties.dtype.itemsize for stored in a.tensors.values()
    )
    with parallel.bar(console, "comparing", num_bytes) as report:
        differences += filter(None, parallel.each(boxes, compare, report))
    return Comparison(len(keys), num_bytes, tuple(differences))


def _num_token_rows(checkpoint: Checkpoint, other: Checkpoint, key: str) -> int:
    """Return the rows of a tensor, without those behind the vocabulary that both state."""
    num_rows = checkpoint.tensors[key].size[0]
    vocab_size = checkpoint.args.get("vocab_size")
    if key not in torch_dist.VOCABULARY or not vocab_size:
        return num_rows
    return min(num_rows, vocab_size) if vocab_size == other.args.get("vocab_size") else num_rows


def _within_rows(
    chunks: Sequence[ChunkStorageMetadata], num_rows: int
) -> Iterator[ChunkStorageMetadata]:
    """Yield the parts of boxes that lie in the first rows of their tensor."""
    for chunk in chunks:
        own_rows = min(chunk.sizes[0], num_rows - chunk.offsets[0])
        if own_rows > 0:
            yield ChunkStorageMetadata(chunk.offsets, torch.Size((own_rows, *chunk.sizes[1:])))


def _compare_formats(
    weights: Weights,
    checkpoint: Checkpoint,
    shape: ModelShape,
    console: Console | None,
    *,
    is_weights_first: bool,
) -> Comparison:
    """Compare a Hugging Face checkpoint with a Megatron one, by the names of Hugging Face."""
    differences = shape.differences(checkpoint.args)
    if differences:
        raise CheckpointError(
            f"{weights.where} and {checkpoint.where} are of different models: "
            f"{'; '.join(differences)}"
        )
    tensors = MegatronTensors(checkpoint, shape, parameters_of(shape))

    def compare(
        piece: tuple[Parameter, tuple[int, ...]], report: storage.Report
    ) -> list[Difference]:
        different: list[Difference] = []
        for name, converted in tensors_of(tensors, *piece).items():
            for target in stored_names(name, shape, weights.tensors):
                if target not in weights.tensors:
                    different.append(only_in(target, checkpoint.where))
                    continue
                stored = _read(weights, target, "first")
                pair = (stored, converted) if is_weights_first else (converted, stored)
                if difference := difference_of(target, *pair):
                    different.append(difference)
                report(stored.nbytes)
        return different

    with parallel.bar(console, "comparing", weights.num_bytes) as report:
        results = parallel.each(pieces_of(shape), compare, report)

    names: set[str] = set()
    for name in hf_shapes(shape):
        names.update(stored_names(name, shape, weights.tensors))
    extra = [only_in(name, weights.where) for name in sorted(set(weights.tensors) - names)]
    return Comparison(
        num_tensors=len(names) + len(extra),
        num_bytes=weights.num_bytes,
        differences=(*itertools.chain.from_iterable(results), *extra),
    )


def _read(weights: Weights, name: str, use: str) -> Tensor:
    stored = weights.tensors[name]
    return weights.read(name, tensor_io.buffer(use, stored.shape, stored.dtype))
