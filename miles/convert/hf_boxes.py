"""Boxes of a model's Megatron tensors, read straight from the files of a Hugging Face checkpoint.

A layout is a view. Run on the numbers of a Megatron tensor's rows, it says which of them are the
rows of which Hugging Face tensor. With two groups of one head, and one row each:

    Megatron's rows    0 1 2 3 4 5   (q0 k0 v0 q1 k1 v1)
    the layout gives   q: 0 3   k: 1 4   v: 2 5
    a box, rows 3-5    q: its row 1 -> 3   k: its row 1 -> 4   v: its row 1 -> 5

Rows that are neighbours in both are moved together. Whole rows are read into their place; of a box
of some columns, whole rows are read into a buffer of bounded size, and the columns copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from miles.architecture.config import ModelShape
from miles.architecture.families import (
    TIED_COPY,
    TIED_TO,
    parameters_of,
)
from miles.architecture.parameters import Parameter
from miles.convert import tensor_io
from miles.convert.expected_tensors import names_in, require_same_model, require_tensors
from miles.convert.safetensors_files import DTYPES, Weights
from miles.errors import CheckpointError, SourceError

CHUNK_BYTES = 16 << 20
"""Bytes of a buffer for whole rows; at least one row."""


@dataclass(frozen=True)
class RowRun:
    """Rows that are neighbours in a Hugging Face tensor and in the Megatron tensor."""

    hf_row: int
    """the first one's number in the Hugging Face tensor"""
    row: int
    """its number in the Megatron tensor"""
    num_rows: int

    def within_rows(self, first: int, last: int) -> RowRun:
        """Return the part in rows [first, last) of the Megatron tensor; it may have no rows."""
        begin = max(self.row, first)
        end = min(self.row + self.num_rows, last)
        return RowRun(self.hf_row + begin - self.row, begin, max(end - begin, 0))

    def within_hf_rows(self, first: int, last: int) -> RowRun:
        """Return the part in rows [first, last) of the Hugging Face tensor."""
        begin = max(self.hf_row, first)
        end = min(self.hf_row + self.num_rows, last)
        return RowRun(begin, self.row + begin - self.hf_row, max(end - begin, 0))


@lru_cache(maxsize=256)
def row_runs(parameter: Parameter) -> tuple[tuple[RowRun, ...], ...]:
    """Return the runs of each Hugging Face tensor of a parameter, in the order of its rows."""
    numbers = torch.arange(parameter.shape[0])
    return tuple(_runs_of(part.reshape(-1).numpy()) for part in parameter.layout(numbers))


def _runs_of(rows: np.ndarray) -> tuple[RowRun, ...]:
    """Divide a Hugging Face tensor into runs.

    Args:
        rows: int64 [rows]: the Megatron tensor's number of each of its rows.
    """
    begins = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist()]
    ends = [*begins[1:], len(rows)]
    return tuple(
        RowRun(begin, int(rows[begin]), end - begin)
        for begin, end in zip(begins, ends, strict=True)
    )


def runs_in(parameter: Parameter, first: int, last: int) -> list[list[RowRun]]:
    """Return the runs in rows [first, last) of a Megatron tensor, by Hugging Face tensor."""
    by_tensor = []
    for runs in row_runs(parameter):
        parts = [run.within_rows(first, last) for run in runs]
        by_tensor.append([part for part in parts if part.num_rows])
    return by_tensor


class HfTensors:
    """A Hugging Face checkpoint, read as the Megatron tensors of a model.

    Args:
        weights: the files.
        shape: of the model.
        parameters: the map of the tensors in them; None: that of the model.

    Raises:
        CheckpointError: names the tensor that is missing, unexpected, of another shape, or of
            another dtype than those that Megatron keeps in one tensor with it.
    """

    def __init__(
        self, weights: Weights, shape: ModelShape, parameters: Sequence[Parameter] | None = None
    ) -> None:
        parameters = parameters_of(shape) if parameters is None else parameters
        self._weights = weights
        self._shape = shape
        self._parameters = {parameter.megatron: parameter for parameter in parameters}
        found = require_tensors(weights.headers, shape, parameters)
        self.dtypes = {key: DTYPES[name] for key, name in found.type_names.items()}
        """by the key of the Megatron tensor"""
        self._has_copy = found.has_copy

    def require_equal_copies(self) -> None:
        """Refuse an output layer that differs from the embedding in a model that ties them.

        Both are read for that, where both are stored.
        """
        if not self._has_copy:
            return

        copy = self._weights.tensors[TIED_COPY]
        original = self._weights.tensors[TIED_TO]
        if copy.shape == original.shape and copy.dtype == original.dtype:
            chunks = self._rows_of(TIED_COPY, "copy", 0, copy.shape[0])
            originals = self._rows_of(TIED_TO, "original", 0, copy.shape[0])
            pairs = zip(chunks, originals, strict=True)
            if all(torch.equal(rows, others) for (_, rows), (_, others) in pairs):
                return

        raise CheckpointError(
            f"{self._weights.where}/{copy.file}: tensor {TIED_COPY} differs from {TIED_TO}, which "
            "config.json says it is (tie_word_embeddings)"
        )

    def read(
        self, key: str, place: Sequence[int], offsets: Sequence[int], target: Tensor
    ) -> Tensor:
        """Fill a tensor with a box of a Megatron tensor.

        Args:
            key: of the Megatron tensor.
            place: in its leading axes (layer, expert).
            offsets: where the box begins in the others.
            target: the tensor to fill, on any device, with the sizes of the box. Where its dtype is
                another one, values are converted as `Tensor.copy_` does it. Rows of padding behind
                the vocabulary become zeros.

        Returns:
            `target`.

        Raises:
            CheckpointError: a file cannot be read.
        """
        parameter = self._parameters[key]
        first = offsets[0]
        names = self._names_of(parameter, tuple(place))
        runs_by_tensor = runs_in(parameter, first, first + target.shape[0])

        for name, runs in zip(names, runs_by_tensor, strict=True):
            if self._fits_as_it_is(name, target):
                for run in runs:
                    rows = target[run.row - first : run.row - first + run.num_rows]
                    self._weights.read(name, rows, self._row_bytes(name) * run.hf_row)
            else:
                self._copy_rows(name, runs, offsets, target)

        num_rows = max(parameter.shape[0] - first, 0)
        target[num_rows:].zero_()  # the rows of padding
        return target

    def _names_of(self, parameter: Parameter, place: tuple[int, ...]) -> list[str]:
        """Return the names under which the tensors of a parameter are read from the files."""
        return names_in(self._weights.headers, self._shape, parameter, place)

    def _fits_as_it_is(self, name: str, target: Tensor) -> bool:
        """Return whether the bytes of rows in the file are those of the target."""
        stored = self._weights.tensors[name]
        is_whole = target.shape[1:] == stored.shape[1:]
        is_alike = target.dtype == stored.dtype and target.is_contiguous()
        return is_whole and is_alike and target.device.type == "cpu" and self._weights.is_local

    def _copy_rows(
        self, name: str, runs: Sequence[RowRun], offsets: Sequence[int], target: Tensor
    ) -> None:
        """Read rows of a tensor chunk by chunk, and copy what the target takes of them."""
        ends = [offset + size for offset, size in zip(offsets, target.shape, strict=True)]
        columns = tuple(map(slice, offsets[1:], ends[1:]))

        for begin, end in _spans(runs):
            for at, chunk in self._rows_of(name, "rows", begin, end):
                for run in runs:
                    part = run.within_hf_rows(at, at + len(chunk))
                    rows = chunk[part.hf_row - at :][: part.num_rows]
                    target[part.row - offsets[0] :][: part.num_rows].copy_(rows[:, *columns])

    def _rows_of(self, name: str, use: str, begin: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """Yield rows [begin, end) of a tensor in chunks, each with the number of its first row.

        Args:
            use: of the buffer; a chunk is valid until the next one.
        """
        stored = self._weights.tensors[name]
        row_bytes = self._row_bytes(name)
        chunk_rows = max(CHUNK_BYTES // max(row_bytes, 1), 1)
        for at in range(begin, end, chunk_rows):
            sizes = (min(chunk_rows, end - at), *stored.shape[1:])
            chunk = tensor_io.buffer(use, sizes, stored.dtype)
            yield at, self._weights.read(name, chunk, row_bytes * at)

    def _row_bytes(self, name: str) -> int:
        stored = self._weights.tensors[name]
        return stored.num_bytes // max(stored.shape[0], 1)


def open_weights(url: str, shape: ModelShape) -> HfTensors:
    """Return the tensors of a folder whose weights a model begins from.

    Args:
        url: of the folder.
        shape: of the model.

    Raises:
        CheckpointError: a checkpoint of another model, or one that `HfTensors` refuses.
    """
    require_same_model(url, shape)
    try:
        return HfTensors(Weights(url), shape)
    except SourceError as error:
        raise CheckpointError(str(error)) from error


def _spans(runs: Sequence[RowRun]) -> Iterator[tuple[int, int]]:
    """Yield the first row, and the one behind the last, of each stretch of runs without a gap.

    Args:
        runs: of one Hugging Face tensor, in the order of its rows.
    """
    begin = end = 0
    for run in runs:
        if run.hf_row != end:
            if end > begin:
                yield begin, end
            begin = run.hf_row
        end = run.hf_row + run.num_rows
    if end > begin:
        yield begin, end
