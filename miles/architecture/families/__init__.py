"""One file a model family: what its `config.json` means, and which Hugging Face tensors make which Megatron tensor.

A family's file is named like its `model_type` and declares `ARCHITECTURE`, `shape` and `parameters`
(docs/adding-a-model.md); nothing else need be told of it. A Megatron tensor is named as
`GPTModel.sharded_state_dict()` names it; those of a layer are stacked on a leading axis of layers, those of an expert
on a second one behind it. Where several Hugging Face tensors make one, a layout says how.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from miles.architecture.config import ModelShape, family_module

if TYPE_CHECKING:  # a configuration is read where torch is not wanted
    from torch import Tensor

LAYER = ("layer",)
EXPERT = ("layer", "expert")

TIED_COPY, TIED_TO = "lm_head.weight", "model.embed_tokens.weight"
"""Some checkpoints store the output layer though it is the embedding; Megatron's never do."""


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
    is_vocabulary: bool = False
    """each row is a token's; rows of padding may follow in a Megatron checkpoint"""

    @property
    def shape(self) -> tuple[int, ...]:
        """of the Megatron tensor, without the leading axes"""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def stack(self, shape: ModelShape) -> tuple[int, ...]:
        """Sizes of the leading axes."""
        return tuple(
            {"layer": shape.num_layers, "expert": shape.num_experts or 0}[axis]
            for axis in self.stacked_by
        )

    def hf_names(self, place: tuple[int, ...]) -> list[str]:
        """The Hugging Face tensors of one place in the leading axes."""
        numbers = dict(zip(self.stacked_by, place, strict=True))
        return [name.format_map(numbers) for name in self.hf]


Layout: TypeAlias = "Callable[[Tensor], Sequence[Tensor]]"
"""The parts of a Megatron tensor that are its Hugging Face tensors: views of it, with as many values in the same order,
not always of the same shape. Copying out of them or into them converts."""


def plain(whole: Tensor) -> Sequence[Tensor]:
    """One tensor, as it is."""
    return (whole,)


def gate_up(whole: Tensor) -> Sequence[Tensor]:
    """The gate's rows, then the up projection's."""
    return whole.chunk(2)


def qkv(shape: ModelShape) -> Layout:
    """Rows by key/value group: its queries, its key, its value. 2 groups of 2 heads: q0 q1 k0 v0 q2 q3 k1 v1."""
    heads = shape.num_attention_heads // shape.num_query_groups
    rows = [heads * shape.kv_channels, shape.kv_channels, shape.kv_channels]

    def layout(whole: Tensor) -> Sequence[Tensor]:
        return whole.view(shape.num_query_groups, sum(rows), *whole.shape[1:]).split(rows, dim=1)

    return layout


def parameters_of(shape: ModelShape) -> tuple[Parameter, ...]:
    """The parameter map of a shape's family."""
    parameters: tuple[Parameter, ...] = family_module(shape.model_type).parameters(shape)
    return parameters


def pieces_of(shape: ModelShape) -> list[tuple[Parameter, tuple[int, ...]]]:
    """Every tensor of a model that is converted by itself: a parameter, and its place in the leading axes.

    In the order of the model: what is before the layers, layer after layer, what is behind them.
    """
    pieces = [
        (parameter, place)
        for parameter in parameters_of(shape)
        for place in itertools.product(*map(range, parameter.stack(shape)))
    ]

    def position(piece: tuple[Parameter, tuple[int, ...]]) -> int:
        parameter, place = piece
        if place:
            return place[0]
        return -1 if parameter.megatron.startswith("embedding.") else shape.num_layers

    return sorted(pieces, key=position)


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of a model, in its order, and its shape."""
    return {
        name: sizes
        for parameter, place in pieces_of(shape)
        for name, sizes in zip(parameter.hf_names(place), parameter.shapes, strict=True)
    }


def stored_as(name: str, shape: ModelShape, stored: Container[str]) -> tuple[str, ...]:
    """The names that a tensor of the map has among those of a checkpoint: a tied embedding may have two."""
    is_stored_twice = name == TIED_TO and shape.tied_embeddings and TIED_COPY in stored
    return (name, TIED_COPY) if is_stored_twice else (name,)


def unasked(names: Sequence[str]) -> str:
    """What is said of tensors that are not of the model."""
    others = f", nor for {len(names) - 1} others" if names[1:] else ""
    return f"config.json does not ask for tensor {names[0]}{others}"
