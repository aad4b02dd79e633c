"""The differences between two tensors: in shape, in dtype, or in bits, and by how much."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same in both checkpoints."""

    tensor: str
    text: str
    """how it differs"""


@dataclass(frozen=True)
class Comparison:
    """The result of comparing two checkpoints."""

    num_tensors: int
    num_bytes: int
    differences: tuple[Difference, ...]


def only_in(name: str, where: str) -> Difference:
    return Difference(name, f"only in {where}")


def difference_of(name: str, a: Tensor, b: Tensor) -> Difference | None:
    """Compare two tensors; return None where every bit is the same."""
    text = kind_difference(tuple(a.shape), a.dtype, tuple(b.shape), b.dtype)
    if text is not None:
        if a.shape == b.shape and torch.equal(a.double(), b.double()):
            text += ", with equal values"
        return Difference(name, text)
    if torch.equal(_bits(a), _bits(b)):
        return None
    return Difference(name, _distance(a, b))


def kind_difference(
    shape_a: tuple[int, ...], dtype_a: torch.dtype, shape_b: tuple[int, ...], dtype_b: torch.dtype
) -> str | None:
    """Return how two tensors differ in shape or dtype; None where they do not."""
    if shape_a != shape_b:
        return f"shape {shape_a} and {shape_b}"
    return f"dtype {dtype_a} and {dtype_b}" if dtype_a != dtype_b else None


def _bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes: in them a NaN equals itself, and 0.0 is not -0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _distance(a: Tensor, b: Tensor) -> str:
    """Return how many values of two tensors differ, and by how much."""
    size = a.element_size()
    is_different = (_bits(a).view(-1, size) != _bits(b).view(-1, size)).any(dim=1)
    largest = (a.double() - b.double()).abs().max().item()
    return f"{int(is_different.sum()):,} of {a.numel():,} values differ, by {largest:.3g} at most"
