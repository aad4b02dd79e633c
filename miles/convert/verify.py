"""Two checkpoints, of either format, compared tensor by tensor, a tensor of each in memory at a time.

Two of Hugging Face are compared by their names, two of Megatron by theirs (the model's; an optimizer's are left out);
one of each by the names of Hugging Face, through the family's parameter map.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from torch import Tensor

from miles.architecture.config import ModelShape
from miles.architecture.families import hf_shapes, pieces_of, read_shape, stored_names
from miles.architecture.parameters import Parameter
from miles.common import storage
from miles.common.checkpoint_tracker import TRACKER
from miles.convert import parallel, tensor_io, torch_dist
from miles.convert.megatron_to_hf import require_complete, tensors_of
from miles.convert.safetensors_files import INDEX, SINGLE, Weights, is_weights
from miles.convert.torch_dist import Checkpoint
from miles.errors import CheckpointError, SourceError


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same in both."""

    tensor: str
    text: str
    """how it differs"""


@dataclass(frozen=True)
class Comparison:
    """What was compared."""

    num_tensors: int
    num_bytes: int
    differences: tuple[Difference, ...]


def verify(one: str, other: str, *, console: Console | None = None) -> Comparison:
    """Compares names, shapes, dtypes and every bit.

    Args:
        one, other: folders (fsspec URLs): a Hugging Face checkpoint, a folder of Megatron checkpoints (its newest is
            taken), or one of these.
        console: shows a bar; None: nothing.

    Raises:
        CheckpointError: one that cannot be read, or two of different models.
    """
    try:
        with _opened(one, console) as a, _opened(other, console) as b:
            if isinstance(a, Weights) and isinstance(b, Weights):
                return _compare_weights(a, b, console)
            if isinstance(a, Checkpoint) and isinstance(b, Checkpoint):
                return _compare_checkpoints(a, b, console)
            if isinstance(a, Weights) and isinstance(b, Checkpoint):
                return _compare_formats(a, b, read_shape(one), console, weights_first=True)
            assert isinstance(a, Checkpoint)
            assert isinstance(b, Weights)
            return _compare_formats(b, a, read_shape(other), console, weights_first=False)
    except SourceError as error:
        raise CheckpointError(str(error)) from error


@contextlib.contextmanager
def _opened(url: str, console: Console | None) -> Iterator[Weights | Checkpoint]:
    watch = partial(parallel.bar, console, "downloading")
    if any(storage.exists(storage.join(url, name)) for name in (TRACKER, "metadata.json")):
        found = torch_dist.newest(url)
        with storage.local_folder(found, "Megatron checkpoint", watch=watch) as folder:
            yield Checkpoint(folder, found)
    elif any(storage.exists(storage.join(url, name)) for name in (INDEX, SINGLE)):
        with storage.local_folder(url, "checkpoint", is_weights, watch) as folder:
            yield Weights(str(folder), url)
    else:
        raise CheckpointError(
            f"{url}: neither a Megatron checkpoint ({TRACKER}, metadata.json) nor one of Hugging Face "
            f"({SINGLE}, {INDEX})"
        )


def _compare_weights(a: Weights, b: Weights, console: Console | None) -> Comparison:
    names = sorted(set(a.tensors) | set(b.tensors))
    with parallel.bar(console, "comparing", a.num_bytes) as report:

        def compare(name: str, report: storage.Report) -> Difference | None:
            if name not in a.tensors or name not in b.tensors:
                return _only_in(name, a.where if name in a.tensors else b.where)
            difference = _difference(name, _read(a, name, "one"), _read(b, name, "other"))
            report(a.tensors[name].num_bytes)
            return difference

        found = parallel.each(names, compare, report)
    return Comparison(len(names), a.num_bytes, tuple(one for one in found if one))


def _compare_checkpoints(a: Checkpoint, b: Checkpoint, console: Console | None) -> Comparison:
    keys = sorted(set(a.tensors) | set(b.tensors))
    num_bytes = sum(
        stored.size.numel() * stored.properties.dtype.itemsize for stored in a.tensors.values()
    )
    differences = [
        _only_in(key, a.where if key in a.tensors else b.where)
        for key in sorted(set(a.tensors) ^ set(b.tensors))
    ]
    unlike = {key: text for key in set(a.tensors) & set(b.tensors) if (text := _unlike(a, b, key))}
    differences += [Difference(key, text) for key, text in sorted(unlike.items())]
    alike = sorted(set(a.tensors) & set(b.tensors) - set(unlike))
    boxes = [(key, chunk) for key in alike for chunk in a.tensors[key].chunks]
    with parallel.bar(console, "comparing", num_bytes) as report:

        def compare(
            box: tuple[str, torch.distributed.checkpoint.metadata.ChunkStorageMetadata],
            report: storage.Report,
        ) -> Difference | None:
            key, chunk = box
            mine, yours = (
                one.read(
                    key,
                    chunk.offsets,
                    tensor_io.buffer(use, chunk.sizes, one.tensors[key].properties.dtype),
                )
                for one, use in ((a, "one"), (b, "other"))
            )
            report(mine.nbytes)
            return _difference(f"{key} at {list(chunk.offsets)}", mine, yours)

        differences += [one for one in parallel.each(boxes, compare, report) if one]
    return Comparison(len(keys), num_bytes, tuple(differences))


def _unlike(a: Checkpoint, b: Checkpoint, key: str) -> str | None:
    mine, yours = a.tensors[key], b.tensors[key]
    return _unlike_kind(
        tuple(mine.size), mine.properties.dtype, tuple(yours.size), yours.properties.dtype
    )


def _compare_formats(
    weights: Weights,
    checkpoint: Checkpoint,
    shape: ModelShape,
    console: Console | None,
    *,
    weights_first: bool,
) -> Comparison:
    differences = shape.differences(checkpoint.args)
    if differences:
        raise CheckpointError(
            f"{weights.where} and {checkpoint.where} are of different models: {'; '.join(differences)}"
        )
    require_complete(checkpoint, shape)
    names = {
        target for name in hf_shapes(shape) for target in stored_names(name, shape, weights.tensors)
    }
    extra = sorted(set(weights.tensors) - names)
    with parallel.bar(console, "comparing", weights.num_bytes) as report:

        def compare(
            piece: tuple[Parameter, tuple[int, ...]], report: storage.Report
        ) -> list[Difference | None]:
            found: list[Difference | None] = []
            for name, theirs in tensors_of(checkpoint, *piece).items():
                for target in stored_names(name, shape, weights.tensors):
                    if target not in weights.tensors:
                        found.append(_only_in(target, checkpoint.where))
                        continue
                    pair = (_read(weights, target, "one"), theirs)
                    found.append(_difference(target, *(pair if weights_first else pair[::-1])))
                    report(pair[0].nbytes)
            return found

        found = [
            one for part in parallel.each(pieces_of(shape), compare, report) for one in part if one
        ]
    found += [_only_in(name, weights.where) for name in extra]
    return Comparison(len(names) + len(extra), weights.num_bytes, tuple(found))


def _read(weights: Weights, name: str, use: str) -> Tensor:
    stored = weights.tensors[name]
    return weights.read(name, tensor_io.buffer(use, stored.shape, stored.dtype))


def _only_in(name: str, where: str) -> Difference:
    return Difference(name, f"only in {where}")


def _difference(name: str, one: Tensor, other: Tensor) -> Difference | None:
    unlike = _unlike_kind(tuple(one.shape), one.dtype, tuple(other.shape), other.dtype)
    if (
        unlike is not None
        and one.shape == other.shape
        and torch.equal(one.double(), other.double())
    ):
        unlike += ", with equal values"
    if unlike is not None:
        return Difference(name, unlike)
    if torch.equal(_bits(one), _bits(other)):
        return None
    return Difference(name, _how_far(one, other))


def _unlike_kind(
    shape: tuple[int, ...], dtype: torch.dtype, shape2: tuple[int, ...], dtype2: torch.dtype
) -> str | None:
    if shape != shape2:
        return f"shape {shape} and {shape2}"
    return f"dtype {dtype} and {dtype2}" if dtype != dtype2 else None


def _bits(tensor: Tensor) -> Tensor:
    """Its bytes: a NaN equals itself, and 0.0 is not -0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _how_far(one: Tensor, other: Tensor) -> str:
    differing = (
        _bits(one).view(-1, one.element_size()) != _bits(other).view(-1, one.element_size())
    ).any(dim=1)
    largest = (one.double() - other.double()).abs().max().item()
    return f"{int(differing.sum()):,} of {one.numel():,} values differ, by {largest:.3g} at most"
