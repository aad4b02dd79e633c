"""A checksum of a model's weights, which tells the base of an adapter from others.

An adapter means nothing beside other weights than those that it was trained beside. So the
checkpoint of a LoRA run states the sum of its base:

    each weight          its bits as an integer, times the number of its row
    each tensor          the sum, times a number that is drawn from its key and its layer
    the base             the sum over all tensors, modulo a prime

A sum does not depend on which rank holds which part, nor on the format of the files. Rows of
padding are zeros, and count nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from rich.console import Console
from torch import Tensor

from miles.architecture.config import ModelShape
from miles.architecture.families import pieces_of
from miles.architecture.parameters import Parameter
from miles.common import storage
from miles.common.adapter_base import ref_load_line
from miles.common.checkpoint_folder import BASE, SavedCheckpoint
from miles.convert import parallel, tensor_io
from miles.convert.hf_boxes import CHUNK_BYTES
from miles.convert.megatron_boxes import Tensors
from miles.errors import CheckpointError

_PRIME = (1 << 31) - 1
_BITS = {2: torch.int16, 4: torch.int32}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""By the names that a checkpoint has for them."""


def sum_of_bits(values: Tensor, first_row: int, dtype: torch.dtype) -> Tensor:
    """Return the sum over all values of a box, as if they had a dtype: int64 [], on its device.

    Args:
        first_row: number of its first row in the whole tensor.
    """
    bits = values.to(dtype).contiguous().view(_BITS[dtype.itemsize])
    rows = bits.reshape(len(bits), -1).sum(dim=1, dtype=torch.int64).remainder(_PRIME)
    numbers = torch.arange(first_row + 1, first_row + 1 + len(rows), device=rows.device)
    return (rows * numbers).remainder(_PRIME).sum()


def part_of(key: str, place: Sequence[int], bits: int) -> int:
    """Return what the sum of a box adds to the checksum.

    Args:
        key: of the Megatron tensor.
        place: in its leading axes (layer, expert).
    """
    digest = hashlib.sha256(f"{key} {list(place)}".encode()).digest()
    return (1 + int.from_bytes(digest[:8]) % (_PRIME - 1)) * bits % _PRIME


def text_of(parts: Sequence[int]) -> str:
    """Return the checksum, as a checkpoint states it."""
    return f"{sum(parts) % _PRIME:08x}"


def require_same(url: str, checksums: Mapping[str, str], checkpoint: SavedCheckpoint) -> None:
    """Refuse weights that the adapter of a checkpoint was not trained beside.

    Of a precision that its run has not computed in, and that does not follow, nothing is known.

    Args:
        url: of the weights.
        checksums: of the weights, by precision.

    Raises:
        CheckpointError: says which weights are wanted.
    """
    stated = _stated_in(checkpoint)
    for precision, checksum in checksums.items():
        if stated.get(precision, checksum) != checksum:
            raise CheckpointError(
                f"{url}: not the weights that the adapter in {checkpoint.url} was trained "
                "beside: they have another checksum. Give those that it began from, with "
                f"{ref_load_line(checkpoint)}"
            )


def require_base(
    url: str,
    tensors: Tensors,
    shape: ModelShape,
    checkpoint: SavedCheckpoint,
    console: Console | None,
) -> None:
    """Read all weights of a model, and refuse others than `require_same` lets pass.

    Nothing is read where the checkpoint states no checksum.

    Args:
        url: of the weights.
        tensors: the weights.
        shape: of the model.
        checkpoint: of a LoRA run.
        console: shows a bar; None: nothing is shown.

    Raises:
        CheckpointError: as `require_same`.
    """
    stated = _stated_in(checkpoint)
    precision = next((name for name in _DTYPES if name in stated), None)
    if precision is None:
        return

    def sum_piece(piece: tuple[Parameter, tuple[int, ...]], report: storage.Report) -> int:
        parameter, place = piece
        key = parameter.megatron
        values = tensor_io.buffer("whole", parameter.shape, tensors.dtypes[key])
        tensors.read(key, place, [0 for _ in parameter.shape], values)

        bits = 0
        chunk_rows = max(CHUNK_BYTES * len(values) // values.nbytes, 1)
        for at in range(0, len(values), chunk_rows):
            bits += int(sum_of_bits(values[at : at + chunk_rows], at, _DTYPES[precision]))
        report(values.nbytes)
        return part_of(key, place, bits)

    pieces = pieces_of(shape)
    with parallel.bar(console, "comparing", _num_bytes(pieces, tensors)) as report:
        parts = parallel.each(pieces, sum_piece, report)
    require_same(url, {precision: text_of(parts)}, checkpoint)


def _stated_in(checkpoint: SavedCheckpoint) -> Mapping[str, str]:
    """Return the checksums that a checkpoint states of its base, by precision."""
    base = (checkpoint.extra or {}).get(BASE)
    checksums = base.get("checksums") if isinstance(base, dict) else None
    return checksums if isinstance(checksums, dict) else {}


def _num_bytes(pieces: Sequence[tuple[Parameter, tuple[int, ...]]], tensors: Tensors) -> int:
    total = 0
    for parameter, _ in pieces:
        num_values = torch.Size(parameter.shape).numel()
        total += num_values * tensors.dtypes[parameter.megatron].itemsize
    return total
