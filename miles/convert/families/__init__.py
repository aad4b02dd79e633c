"""One file a model family: which Hugging Face tensors make which Megatron tensor.

A Megatron tensor is named as `GPTModel.sharded_state_dict()` names it; those of a layer are stacked on a
leading axis of layers, those of an expert on a second one behind it. Where several Hugging Face tensors make one, a
layout says how.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from miles.architecture import ModelShape

LAYER = ("layer",)
EXPERT = ("layer", "expert")


@dataclass(frozen=True)
class Parameter:
    """One tensor of a Megatron model, or one of each layer or expert."""

    megatron: str
    """its key; without layer and expert"""
    hf: tuple[str, ...]
    """the Hugging Face tensors it is made of; `{layer}` and `{expert}` stand for numbers"""
    shapes: tuple[tuple[int, ...], ...]
    """their shapes"""
    layout: Layout
    stacked_by: tuple[str, ...] = ()
    """the leading axes: none, `LAYER` or `EXPERT`"""

    @property
    def shape(self) -> tuple[int, ...]:
        """of the Megatron tensor, without the leading axes"""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def stack(self, shape: ModelShape) -> tuple[int, ...]:
        """Sizes of the leading axes."""
        return tuple({"layer": shape.num_layers, "expert": shape.num_experts or 0}[axis] for axis in self.stacked_by)

    def hf_names(self, place: tuple[int, ...]) -> list[str]:
        """The Hugging Face tensors of one place in the leading axes."""
        numbers = dict(zip(self.stacked_by, place, strict=True))
        return [name.format_map(numbers) for name in self.hf]


@dataclass(frozen=True)
class Layout:
    """How tensors are laid out in one, and taken out of it again."""

    fuse: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]


PLAIN = Layout(fuse=lambda parts: parts[0], split=lambda whole: [whole])

GATE_UP = Layout(fuse=torch.cat, split=lambda whole: list(whole.chunk(2)))
"""The gate's rows, then the up projection's."""


def qkv_layout(shape: ModelShape) -> Layout:
    """Rows by key/value group: its queries, its key, its value. 2 groups of 2 heads: q0 q1 k0 v0 q2 q3 k1 v1."""
    heads = shape.num_attention_heads // shape.num_query_groups
    rows = [heads * shape.kv_channels, shape.kv_channels, shape.kv_channels]

    def fuse(parts: list[Tensor]) -> Tensor:
        grouped = [
            part.reshape(shape.num_query_groups, count, *part.shape[1:])
            for part, count in zip(parts, rows, strict=True)
        ]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(whole: Tensor) -> list[Tensor]:
        grouped = whole.reshape(shape.num_query_groups, sum(rows), *whole.shape[1:])
        return [part.flatten(0, 1) for part in grouped.split(rows, dim=1)]

    return Layout(fuse, split)
