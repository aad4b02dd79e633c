"""What autograd keeps of a forward pass on a rank, in bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from miles.architecture.config import ModelShape
from miles.architecture.sizes import key_size, padded_vocab_size, query_size
from miles.train.compute_config import ComputeConfig
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.recompute_config import KEEP_ALL
from miles.train.types import AdapterSettings
from tests.support.ranks import start

Way = tuple[ModelShape, ComputeConfig, AdapterSettings | None]
"""A model, how it is computed, and its adapters."""


def saved(layout: Layout, rank: int, meeting: Path, ways: list[Way], tokens: int) -> list[int]:
    """Return the bytes that autograd keeps of a forward pass, without weights and the loss's."""
    from miles.train.model.build import build_model
    from miles.train.model.device_batch import send
    from miles.train.model.packed_forward import forward_packed, single_sequence

    start(layout, rank, meeting)
    sizes = []
    for shape, compute, lora in ways:
        model = build_model(
            shape, layout, precision=Precision.FP32, recompute=KEEP_ALL, compute=compute, lora=lora
        )
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages: dict[int, int] = {}
        kept: list[Any] = []  # else an address might come again

        def keep(
            value: torch.Tensor,
            storages: Any = storages,
            kept: Any = kept,
            rows: int = padded_vocab_size(shape, layout.tensor) // layout.tensor,
        ) -> Any:
            kept.append(value)
            if rows not in value.shape:
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            forward_packed(model, send(single_sequence(range(tokens))), with_labels=True)
        sizes.append(sum(size for place, size in storages.items() if place not in weights))
    return sizes


def more_on_a_cpu(shape: ModelShape, lora: AdapterSettings | None) -> int:
    """Return the values that are kept for a token on a CPU, and not by the kernels of a GPU."""
    queries, keys = query_size(shape), key_size(shape)
    # Attention keeps the values as a part of the whole projection.
    layer = queries if shape.qk_layernorm else queries + keys
    if lora is not None:
        # Nothing below the first adapter is kept: the input of the first norm.
        return shape.num_layers * layer - shape.hidden_size

    # A norm also keeps its normalized values, for the gradient of its weight.
    layer += 2 * shape.hidden_size
    layer += queries + keys if shape.qk_layernorm else 0
    return shape.num_layers * layer + shape.hidden_size
