"""Adapters beside the frozen linear layers of a model: LoRA.

    x [tokens, in]  ->  W x  +  scale B A x

Megatron's layers stay as they are; a hook on the output of a linear layer adds what its adapters
make of its input. One matrix of Megatron's has several projections, each with a pair (A, B) of its
own. Of a layer with two groups of two heads, and of rank r:

    z = x [A_q; A_k; A_v]^T        [tokens, 3 r]
                                       B_q[0]    0       0
                                         0     B_k[0]    0
    output = W x + scale z B^T     B =   0       0     B_v[0]       [rows of linear_qkv, 3 r]
                                       B_q[1]    0       0
                                         0     B_k[1]    0
                                         0       0     B_v[1]

The product with B is added to W x by the product itself, in one pass over the output. Its zeros
cost less than passes that put three products together.

    column-parallel: q, k, v, gate, up     A on every rank, B divided by rows
    row-parallel: o, down                  A divided by columns, B on every rank

Tensor-parallel ranks exchange z, which is narrow. With sequence parallelism, the gradient of a
weight that is not divided is of one rank's tokens: it is marked, so that Megatron adds them up.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.architecture.adapter import (
    ADAPTER,
    MEGATRON_NAMES,
    ROW_PARALLEL_TARGETS,
    projection_sizes,
)
from miles.architecture.config import ModelShape
from miles.train.model.adapter_dropout import Dropout, channel_keys
from miles.train.model.data_parallel import await_weights
from miles.train.types import AdapterSettings

_NAME = ADAPTER.rsplit(".", 1)[1]
"""The name of the adapter among the parts of a layer."""


def add_adapters(model: Any, shape: ModelShape, settings: AdapterSettings) -> None:
    """Freeze the weights of a `GPTModel`, and give its layers adapters, which alone are trained.

    Call it before Megatron's DDP wraps the model: it keeps gradients of what is trained.

    Args:
        model: this rank's part, on any pipeline stage.
    """
    model.lora = settings
    model.requires_grad_(False)
    ranks = _TensorRanks.of(model.config)
    for layer in model.decoder.layers:
        number = layer.layer_number - 1
        adapter = LayerAdapter(shape, settings, ranks, number, model.config.params_dtype)
        setattr(layer, _NAME, adapter)
        adapter.attach(layer)

    if model.pre_process and model.config.recompute_granularity == "full":
        # A layer that is computed again takes part in the backward pass only if its input does.
        model.embedding.register_forward_hook(_require_gradient)


def is_adapter(name: str) -> bool:
    """Return whether a parameter or a key of a checkpoint is an adapter's, not the base's."""
    return f".{_NAME}." in name


def initial_a(seed: int, layer: int, target: str, rank: int, num_in: int) -> Tensor:
    """Return the A that a projection begins with, float32 [rank, in]: uniform within ±1/√in.

    It is what PEFT draws from (`kaiming_uniform_` with a = √5); the numbers are those of the seed
    and the place in the model, so that they are the same on any layout.

    Args:
        layer: number in the whole model.
        num_in: of the whole projection.
    """
    digest = hashlib.sha256(f"{seed}/{layer}/{target}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    bound = 1 / math.sqrt(num_in)
    return torch.empty(rank, num_in).uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class _TensorRanks:
    """The tensor-parallel ranks of a replica, and this rank's place among them."""

    size: int
    rank: int
    group: Any
    is_sequence_parallel: bool

    @classmethod
    def of(cls, config: Any) -> _TensorRanks:
        """Return those of this process."""
        from megatron.core import parallel_state

        return cls(
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_group(),
            config.sequence_parallel,
        )

    def part(self, whole: Tensor, axis: int) -> Tensor:
        """Return this rank's part of a tensor that is divided evenly along an axis."""
        return whole.chunk(self.size, axis)[self.rank]


class LowRankPair(torch.nn.Module):
    """The A [rank, in] and the B [out, rank] of a projection: what this rank has of them.

    Args:
        whole_a: A of all ranks, in the precision of the model. B is zeros.
        num_out: rows of B of all ranks.
        has_dropout: keep what tells the channels of the input apart.
    """

    channels: Tensor | None
    """int32 [in]: `channel_keys` of the input; None without dropout"""

    def __init__(
        self,
        whole_a: Tensor,
        num_out: int,
        ranks: _TensorRanks,
        *,
        is_row_parallel: bool,
        has_dropout: bool,
    ) -> None:
        super().__init__()
        self._ranks = ranks
        self._divided_axes = {"lora_A": 1} if is_row_parallel else {"lora_B": 0}
        whole_b = whole_a.new_zeros(num_out, len(whole_a))
        for name, whole in (("lora_A", whole_a), ("lora_B", whole_b)):
            axis = self._divided_axes.get(name)
            part = whole if axis is None else ranks.part(whole, axis).clone()
            weight: Any = torch.nn.Parameter(part)
            # In the norm of the gradient, Megatron counts what is not divided once.
            weight.tensor_model_parallel = axis is not None
            weight.sequence_parallel = ranks.is_sequence_parallel and axis is None
            self.register_parameter(name, weight)

        num_in = self.lora_A.shape[1]
        first = ranks.rank * num_in if is_row_parallel else 0
        keys = channel_keys(first, num_in) if has_dropout else None
        self.register_buffer("channels", keys, persistent=False)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the tensors for a checkpoint, as Megatron's modules do."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self._divided_axes,
            sharded_offsets,
            tp_group=self._ranks.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return state


class LayerAdapter(torch.nn.Module):
    """The adapters of a layer, by target.

    Args:
        layer: number in the whole model.
        dtype: of the weights.
    """

    def __init__(
        self,
        shape: ModelShape,
        settings: AdapterSettings,
        ranks: _TensorRanks,
        layer: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self._shape = shape
        self._settings = settings
        self._ranks = ranks
        self._layer = layer
        self._tokens: Tensor | None = None

        adapter = settings.adapter
        for target in adapter.targets:
            num_out, num_in = projection_sizes(shape, target)
            whole_a = initial_a(settings.seed, layer, target, adapter.rank, num_in)
            pair = LowRankPair(
                whole_a.to(dtype),
                num_out,
                ranks,
                is_row_parallel=target in ROW_PARALLEL_TARGETS,
                has_dropout=settings.dropout > 0,
            )
            self.add_module(target, pair)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the tensors for a checkpoint, as Megatron's modules do."""
        state: dict[str, Any] = {}
        for target in self._settings.adapter.targets:
            pair: LowRankPair = getattr(self, target)
            state |= pair.sharded_state_dict(f"{prefix}{target}.", sharded_offsets, metadata)
        return state

    def attach(self, layer: Any) -> None:
        """Have the linear layers of a transformer layer add the product of their adapters."""
        for name, targets in MEGATRON_NAMES.items():
            pairs = {target: getattr(self, target) for target in targets if hasattr(self, target)}
            if pairs:
                part = layer.self_attention if hasattr(layer.self_attention, name) else layer.mlp
                matrix = _matrix(self._shape, self._ranks, pairs, name)
                getattr(part, name).register_forward_hook(partial(self._add_product, matrix))
        if self._settings.dropout > 0:
            layer.register_forward_pre_hook(self._take_tokens, with_kwargs=True)

    def _take_tokens(self, layer: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        """Take the tokens of the micro-batch that the layer computes, maybe again."""
        self._tokens = keywords["packed_seq_params"].token_keys

    def _add_product(
        self, matrix: _Matrix, linear: Any, inputs: tuple[Tensor], output: tuple[Tensor, Any]
    ) -> tuple[Tensor, Any]:
        """Return a linear layer's output and bias, the adapters' product added to the output."""
        await_weights(*matrix.pairs.values())
        base, bias = output
        narrow = self._sum_over_ranks(self._narrow(matrix, inputs[0].flatten(0, -2)), matrix)
        scale = self._settings.adapter.scale
        total = torch.addmm(base.flatten(0, -2), narrow, matrix.joined_b().t(), alpha=scale)
        return total.view(base.shape), bias

    def _narrow(self, matrix: _Matrix, inputs: Tensor) -> Tensor:
        """Return the products of inputs [tokens, in] with each A, [tokens, rank x pairs]."""
        pairs = matrix.pairs
        if self._tokens is None:
            weights = [pair.lora_A for pair in pairs.values()]
            return inputs @ (torch.cat(weights) if len(weights) > 1 else weights[0]).t()

        tokens = self._tokens
        if self._ranks.is_sequence_parallel and not matrix.is_row_parallel:
            tokens = self._ranks.part(tokens, 0)
        products = []
        for target, pair in pairs.items():
            share = self._settings.dropout
            dropout = Dropout.of(tokens, self._layer, target, pair.channels, share)
            products.append(dropout.product(inputs, pair.lora_A))
        return torch.cat(products, dim=1)

    def _sum_over_ranks(self, narrow: Tensor, matrix: _Matrix) -> Tensor:
        """Return what each tensor-parallel rank multiplies with its B.

        Args:
            narrow: [tokens, rank x pairs], what this rank has. Column-parallel: of its tokens,
                with sequence parallelism. Row-parallel: of its channels.
        """
        if self._ranks.size == 1:
            return narrow
        from megatron.core.tensor_parallel import mappings

        group = self._ranks.group
        if matrix.is_row_parallel:
            if self._ranks.is_sequence_parallel:
                return mappings.reduce_scatter_to_sequence_parallel_region(narrow, group=group)
            return mappings.reduce_from_tensor_model_parallel_region(narrow, group=group)
        if self._ranks.is_sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(narrow, group=group)
        return mappings.copy_to_tensor_model_parallel_region(narrow, group=group)


@dataclass(frozen=True)
class _Matrix:
    """One of Megatron's matrices with the pairs of its projections."""

    pairs: Mapping[str, LowRankPair]
    """by target, in the order of the matrix"""
    blocks: Sequence[tuple[str, int]]
    """targets with their rows in each group, in the order of the matrix"""
    num_groups: int
    """on this rank"""
    is_row_parallel: bool

    def joined_b(self) -> Tensor:
        """Return the B of all pairs in the order of the matrix, [rows, rank x pairs].

        A pair has columns of its own, and zeros in the rows of the others.
        """
        if len(self.blocks) == 1:
            (pair,) = self.pairs.values()
            return pair.lora_B

        ranks = {target: pair.lora_B.shape[1] for target, pair in self.pairs.items()}
        width = sum(ranks.values())
        first = 0
        blocks = []
        for target, num_rows in self.blocks:
            if target not in self.pairs:
                some_b = next(iter(self.pairs.values())).lora_B
                blocks.append(some_b.new_zeros(self.num_groups, num_rows, width))
                continue
            rank = ranks[target]
            block = self.pairs[target].lora_B.view(self.num_groups, num_rows, rank)
            blocks.append(F.pad(block, (first, width - first - rank)))
            first += rank
        return torch.cat(blocks, dim=1).view(-1, width)


def _matrix(
    shape: ModelShape, ranks: _TensorRanks, pairs: Mapping[str, LowRankPair], name: str
) -> _Matrix:
    """Return one of Megatron's matrices, by name, with the pairs of its projections."""
    is_row_parallel = not set(MEGATRON_NAMES[name]).isdisjoint(ROW_PARALLEL_TARGETS)
    # Queries, keys and values take turns; gate and up projection follow each other.
    num_groups = shape.num_query_groups // ranks.size if name == "linear_qkv" else 1
    num_parts = num_groups if is_row_parallel else num_groups * ranks.size
    blocks = []
    for target in MEGATRON_NAMES[name]:
        num_rows, _ = projection_sizes(shape, target)
        blocks.append((target, num_rows // num_parts))
    return _Matrix(pairs, blocks, num_groups, is_row_parallel)


def _require_gradient(module: Any, inputs: Any, output: Tensor) -> None:
    """Have the output of the frozen embedding take part in the backward pass."""
    if torch.is_grad_enabled():
        output.requires_grad_()
