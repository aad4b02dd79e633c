"""A model's Megatron tensors with an adapter in them: W + scale B A, one tensor at a time.

Each weight of a projection with an adapter is computed in float32 and rounded once, to the dtype
that it is written in. All others are what they are in the base. With Megatron's order of rows, the
weights of a fused matrix are views of it (`Parameter.layout`), and each has its own B A added.

A weight that the dtype cannot hold is refused: as infinity, it would make a model of NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from miles.architecture.adapter import ADAPTER, AdapterShape, module_of, projection_sizes
from miles.architecture.config import ModelShape
from miles.architecture.families import parameters_of
from miles.convert import tensor_io
from miles.convert.hf_boxes import CHUNK_BYTES
from miles.convert.megatron_boxes import Tensors
from miles.errors import CheckpointError


class MergedTensors:
    """The tensors of a base and of an adapter, read as those of the merged model.

    Args:
        base: the model's tensors.
        adapter: those of the adapter.
        shape: of the model.
        adapter_shape: of the adapter.
        dtypes: to round to, by the key of the Megatron tensor.
        where: names the adapter in errors.

    Raises:
        CheckpointError: the model does not have a projection of the adapter.
    """

    def __init__(
        self,
        base: Tensors,
        adapter: Tensors,
        *,
        shape: ModelShape,
        adapter_shape: AdapterShape,
        dtypes: Mapping[str, torch.dtype],
        where: str,
    ) -> None:
        self._base = base
        self._adapter = adapter
        self._shape = shape
        self._adapter_shape = adapter_shape
        self._where = where
        self._parameters = {parameter.megatron: parameter for parameter in parameters_of(shape)}
        self._targets = {f"{module_of(name)}.weight": name for name in adapter_shape.targets}
        """projection, by the pattern of its weight's name"""
        self.dtypes = dtypes

        names = itertools.chain.from_iterable(parameter.hf for parameter in parameters_of(shape))
        lacking = sorted(set(self._targets) - set(names))
        if lacking:
            raise CheckpointError(
                f"{where}: has an adapter of {self._targets[lacking[0]]}, and the model no weight "
                "of its own for it: an adapter of this model was expected"
            )

    def read(
        self, key: str, place: Sequence[int], offsets: Sequence[int], target: Tensor
    ) -> Tensor:
        """Fill a tensor with a whole Megatron tensor at one place of its leading axes.

        Args:
            key: of the Megatron tensor.
            place: in its leading axes (layer, expert).
            offsets: zeros.
            target: the tensor to fill, of `dtypes`. Rows of padding become zeros.

        Returns:
            `target`.

        Raises:
            CheckpointError: a file cannot be read; the adapter holds NaN or infinity, or a weight
                would.
        """
        assert not any(offsets), "whole tensors are merged"
        parameter = self._parameters[key]
        dtype = self._base.dtypes[key]
        own = target if dtype == target.dtype else tensor_io.buffer("base", target.shape, dtype)
        self._base.read(key, place, offsets, own)
        if own is not target:
            target[parameter.shape[0] :].zero_()

        num_rows = parameter.shape[0]
        weights = parameter.layout(own[:num_rows])
        merged = parameter.layout(target[:num_rows])
        names = parameter.hf_names(tuple(place))
        for pattern, name, weight, result in zip(parameter.hf, names, weights, merged, strict=True):
            if pattern in self._targets:
                self._merge(name, self._targets[pattern], place[0], weight, result)
            elif own is not target:
                result.copy_(weight)
                self._require_finite(name, weight, result)
        return target

    def _merge(
        self, name: str, projection: str, layer: int, weight: Tensor, result: Tensor
    ) -> None:
        """Add a projection's adapter to its weight.

        Args:
            name: of the weight, for errors.
            weight: of the base, [rows, in], or [groups, rows of a group, in].
            result: where the sum is written; it may be `weight` itself.
        """
        num_out, num_in = projection_sizes(self._shape, projection)
        a = self._matrix(projection, "lora_A", layer, (self._adapter_shape.rank, num_in))
        b = self._matrix(projection, "lora_B", layer, (num_out, self._adapter_shape.rank))

        if weight.dim() == 2:
            weight, result = weight.unsqueeze(0), result.unsqueeze(0)
        b = b.view(*weight.shape[:-1], b.shape[1])

        chunk_rows = max(CHUNK_BYTES // (4 * num_in), 1)
        for weight_group, result_group, b_group in zip(weight, result, b, strict=True):
            for at in range(0, len(weight_group), chunk_rows):
                rows = slice(at, at + chunk_rows)
                total = (b_group[rows] @ a).mul_(self._adapter_shape.scale)
                total.add_(weight_group[rows])
                result_group[rows].copy_(total)
                self._require_finite(name, total, result_group[rows])

    def _require_finite(self, name: str, exact: Tensor, result: Tensor) -> None:
        """Refuse a weight that is infinity or NaN once it is rounded.

        Args:
            exact: what was rounded.

        Raises:
            CheckpointError: says which tensor, and why.
        """
        if torch.isfinite(result).all():
            return
        dtype = str(result.dtype).removeprefix("torch.")
        if torch.isfinite(exact).all():
            largest, limit = float(exact.abs().max()), torch.finfo(result.dtype).max
            raise CheckpointError(
                f"{self._where}: tensor {name} would have {largest:.3g}, and {dtype} ends at "
                f"{limit:.3g}: give an --hf-checkpoint whose weights are bfloat16 or float32, or an "
                "adapter that is not as large"
            )
        raise CheckpointError(
            f"{self._where}: tensor {name} would hold infinity or NaN: the base holds some there, or "
            "the adapter is too large. Give weights and an adapter of an earlier step"
        )

    def _matrix(self, projection: str, name: str, layer: int, sizes: tuple[int, int]) -> Tensor:
        """Read A or B of a layer, as float32.

        Raises:
            CheckpointError: it holds NaN or infinity.
        """
        key = f"{ADAPTER}.{projection}.{name}"
        stored = tensor_io.buffer(name, sizes, self._adapter.dtypes[key])
        self._adapter.read(key, (layer,), (0, 0), stored)
        if not torch.isfinite(stored).all():
            raise CheckpointError(
                f"{self._where}: {name} of {projection} in layer {layer} holds NaN or infinity, "
                "and so would the merged weights: take an adapter of an earlier step"
            )
        return stored.float()
