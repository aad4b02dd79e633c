"""The records that a parameter map is made of: one `Parameter` for each Megatron tensor.

A Megatron tensor is named as `GPTModel.sharded_state_dict()` names it. The tensors of all layers
are stacked on a leading axis, those of all experts on a second axis behind it. Where several
Hugging Face tensors make up one, a layout says how they lie in it:

    plain      one tensor, as it is
    gate_up    the gate's rows, then the up projection's
    qkv        by key/value group: its queries, its key, its value
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from miles.architecture.config import ModelShape
from miles.architecture.sizes import heads_per_group

if TYPE_CHECKING:  # a configuration is read where torch is not wanted
    from torch import Tensor

LAYER = ("layer",)
EXPERT = ("layer", "expert")

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
"""The keys of the two tensors with a row for each token."""

FUSED_NORM = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
"""The key of the norm before each MLP, and with Megatron's local layers of that before experts."""
EXPERTS_NORM = "decoder.layers.pre_mlp_layernorm.weight"
"""The key that Transformer Engine's layers give to the norm before experts, which nothing fuses."""

Layout: TypeAlias = "Callable[[Tensor], Sequence[Tensor]]"
"""Returns the parts of a Megatron tensor that are its Hugging Face tensors. The parts are views,
with as many values in the same order, though not always of the same shape. Copying out of them
converts one way, copying into them the other."""


@dataclass(frozen=True)
class Parameter:
    """One tensor of a Megatron model, or one of each layer or expert."""

    megatron: str
    """its key, without the numbers of layer and expert"""
    hf: tuple[str, ...]
    """the Hugging Face tensors it is made of; `{layer}` and `{expert}` stand for numbers"""
    shapes: tuple[tuple[int, ...], ...]
    """their shapes"""
    layout: Layout
    stacked_by: tuple[str, ...] = ()
    """the leading axes: none, `LAYER` or `EXPERT`"""
    is_vocabulary: bool = False
    """each row is a token's; a Megatron checkpoint may hold rows of padding behind them"""
    second_key: str | None = None
    """a key under which other layers of Megatron ask for the same tensor: written twice, read from
    either"""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the Megatron tensor, without the leading axes."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def stack(self, shape: ModelShape) -> tuple[int, ...]:
        """Return the sizes of the leading axes."""
        return _stack(self.stacked_by, shape)

    def hf_names(self, place: tuple[int, ...]) -> list[str]:
        """Return the names of the Hugging Face tensors at one place in the leading axes."""
        numbers = dict(zip(self.stacked_by, place, strict=True))
        return [name.format_map(numbers) for name in self.hf]


@dataclass(frozen=True)
class ExtraState:
    """An object that Megatron saves for a module beside its tensors, or for one of each layer.

    It holds the scaling of FP8 and is empty without. Megatron's loader wants one for each module
    that may have it: the linear layers of its local specification, and of Transformer Engine's also
    norms and attention.
    """

    module: str
    """without the numbers of layer and expert"""
    stacked_by: tuple[str, ...] = ()
    """the leading axes: none, `LAYER` or `EXPERT`"""

    @property
    def key(self) -> str:
        """The key that the objects of all layers share."""
        return f"{self.module}._extra_state"

    def object_keys(self, shape: ModelShape) -> list[str]:
        """Return the key of each object in a checkpoint, such as `…/shard_2_4` of layer 2 of 4."""
        stack = _stack(self.stacked_by, shape) or (1,)
        places = itertools.product(*(range(size) for size in stack))
        return [f"{self.key}/shard_{_dotted(place)}_{_dotted(stack)}" for place in places]


def _stack(stacked_by: Sequence[str], shape: ModelShape) -> tuple[int, ...]:
    sizes = {"layer": shape.num_layers, "expert": shape.num_experts or 0}
    return tuple(sizes[axis] for axis in stacked_by)


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


def plain(tensor: Tensor) -> Sequence[Tensor]:
    """Return the one tensor, as it is."""
    return (tensor,)


def gate_up(tensor: Tensor) -> Sequence[Tensor]:
    """Return the gate's rows, then the up projection's."""
    return tensor.chunk(2)


def qkv(shape: ModelShape) -> Layout:
    """Return the layout of queries, keys and values by key/value group.

    With 2 groups of 2 query heads, the rows are those of q0 q1 k0 v0 q2 q3 k1 v1.
    """
    rows = [heads_per_group(shape) * shape.kv_channels, shape.kv_channels, shape.kv_channels]

    def layout(tensor: Tensor) -> Sequence[Tensor]:
        groups = tensor.view(shape.num_query_groups, sum(rows), *tensor.shape[1:])
        return groups.split(rows, dim=1)

    return layout
