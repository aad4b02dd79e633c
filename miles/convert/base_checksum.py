"""A checksum of a model's weights, which tells the base of an adapter from others.

An adapter means nothing beside other weights than those that it was trained beside. So the
checkpoint of a LoRA run states the sum of its base:

    each word            4 bytes of a row, as an integer, times a number that is drawn from its
                         row, and one from its column
    each tensor          the sum, times a number that is drawn from its key and its layer
    the base             the sum over all tensors, modulo 2^64

A weight at another place counts as another one. All drawn numbers are odd: they multiply no weight
away. A sum does not depend on which rank holds which part, nor on the format of the files. Rows of
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

_MODULUS = 1 << 64
"""Sums and products of torch's integers wrap around at it."""
_WORD_BYTES = 4
_CHUNK_WORDS = 1 << 20
"""That are multiplied at a time: so the products stay near the processor."""
_ROWS, _COLUMNS = 0x5851F42D4C957F2D, 0x14057B7EF767814F
"""The seeds of the numbers of rows and of those of columns."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""By the names that a checkpoint has for them."""


def sum_of_bits(values: Tensor, offsets: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the sum over all values of a box, as if they had a dtype: int64 [], on its device.

    Args:
        values: a matrix, or a vector, which is one of a single column.
        offsets: where the box begins in the whole tensor.
    """
    assert 0 < values.dim() == len(offsets) <= 2, "a vector or a matrix"
    first_row, first_column = (*offsets, 0)[:2]
    words = _words(values.to(dtype).reshape(len(values), -1), first_column)
    first_word = first_column * dtype.itemsize // _WORD_BYTES
    of_columns = _drawn(_COLUMNS, first_word, words.shape[1], words.device)
    of_rows = _drawn(_ROWS, first_row, len(words), words.device)

    num_rows = max(_CHUNK_WORDS // words.shape[1], 1)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for chunk, numbers in zip(words.split(num_rows), of_rows.split(num_rows), strict=True):
        total += ((chunk * of_columns).sum(dim=1) * numbers).sum()
    return total


def _words(matrix: Tensor, first_column: int) -> Tensor:
    """Return the rows of a matrix as int32 [rows, words].

    A word that a box holds a part of has zeros for the rest: the sum of its parts is the word.

    Args:
        first_column: of the matrix, in the whole tensor.
    """
    columns_a_word = _WORD_BYTES // matrix.itemsize
    before = first_column % columns_a_word
    behind = -(before + matrix.shape[1]) % columns_a_word
    if before or behind:
        matrix = torch.nn.functional.pad(matrix, (before, behind))
    if not matrix.is_contiguous() or matrix.storage_offset() % columns_a_word:
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    return matrix.view(torch.int32)


def _drawn(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """Return an odd number for each row or column: int64 [count], those of splitmix64."""
    mixed = torch.arange(first + 1, first + 1 + count, device=device) * -0x61C8864680B583EB + seed
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    return (mixed ^ (mixed >> 31)) | 1


def part_of(key: str, place: Sequence[int], bits: int) -> int:
    """Return what the sum of a box adds to the checksum.

    Args:
        key: of the Megatron tensor.
        place: in its leading axes (layer, expert).
    """
    digest = hashlib.sha256(f"{key} {list(place)}".encode()).digest()
    return (int.from_bytes(digest[:8]) | 1) * bits % _MODULUS


def text_of(parts: Sequence[int]) -> str:
    """Return the checksum, as a checkpoint states it."""
    return f"{sum(parts) % _MODULUS:016x}"


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
    checksum = checksum_of(tensors, shape, precision, console)
    require_same(url, {precision: checksum}, checkpoint)


def checksum_of(
    tensors: Tensors, shape: ModelShape, precision: str, console: Console | None
) -> str:
    """Read all weights of a model, and return their checksum, as if they had a precision.

    Args:
        tensors: the weights.
        shape: of the model.
        precision: its name in a checkpoint.
        console: shows a bar; None: nothing is shown.
    """

    def sum_piece(piece: tuple[Parameter, tuple[int, ...]], report: storage.Report) -> int:
        parameter, place = piece
        key = parameter.megatron
        values = tensor_io.buffer("whole", parameter.shape, tensors.dtypes[key])
        tensors.read(key, place, [0 for _ in parameter.shape], values)

        bits = 0
        chunk_rows = max(CHUNK_BYTES * len(values) // values.nbytes, 1)
        for at in range(0, len(values), chunk_rows):
            offsets = (at, *(0 for _ in parameter.shape[1:]))
            box = values[at : at + chunk_rows]
            bits += int(sum_of_bits(box, offsets, _DTYPES[precision]))
        report(values.nbytes)
        return part_of(key, place, bits)

    pieces = pieces_of(shape)
    with parallel.bar(console, "comparing", _num_bytes(pieces, tensors)) as report:
        parts = parallel.each(pieces, sum_piece, report)
    return text_of(parts)


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
