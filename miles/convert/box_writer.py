"""Boxes of a model's Megatron tensors, written to their places in Hugging Face's files.

The reverse of `hf_boxes`: the files are there already, at their full size and with their headers.
Each rank writes what it holds, in any order, while others write beside it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from miles.architecture.adapter import AdapterShape, adapter_parameters
from miles.architecture.config import ModelShape
from miles.architecture.families import parameters_of, stored_names
from miles.convert import parallel, tensor_io
from miles.convert.hf_boxes import CHUNK_BYTES, RowRun, runs_in
from miles.convert.safetensors_files import Stored, Weights
from miles.convert.safetensors_headers import ADAPTER, SINGLE


class BoxWriter:
    """Writes boxes into the files of a folder. `close` it in any case.

    Args:
        folder: local, with files that `ExportPlan.create` made.
        shape: of the model.
        adapter: whose tensors the files hold, made by `AdapterPlan.create`; None: the model's.

    Raises:
        CheckpointError: the files are not there, or are not such files.
    """

    def __init__(
        self, folder: Path, shape: ModelShape, adapter: AdapterShape | None = None
    ) -> None:
        single = SINGLE if adapter is None else ADAPTER
        parameters = parameters_of(shape) if adapter is None else adapter_parameters(shape, adapter)
        self._shape = shape
        self._stored = Weights(str(folder), single=single).tensors
        self._parameters = {parameter.megatron: parameter for parameter in parameters}
        self._descriptors: dict[str, int] = {}
        for file in sorted({stored.file for stored in self._stored.values()}):
            self._descriptors[file] = os.open(folder / file, os.O_WRONLY)

    def write(self, key: str, place: Sequence[int], offsets: Sequence[int], values: Tensor) -> int:
        """Write a box of a Megatron tensor, converted to the dtypes of the files.

        Args:
            key: of the Megatron tensor.
            place: in its leading axes (layer, expert).
            offsets: where the box begins in the others.
            values: of the box, on any device. Rows of padding are left out.

        Returns:
            the bytes that were written.

        Raises:
            OSError: they could not be.
        """
        parameter = self._parameters[key]
        first = offsets[0]
        names = parameter.hf_names(tuple(place))
        runs_by_tensor = runs_in(parameter, first, first + values.shape[0])

        num_bytes = 0
        for name, runs in zip(names, runs_by_tensor, strict=True):
            for target in stored_names(name, self._shape, self._stored):
                for run in runs:
                    rows = values[run.row - first :][: run.num_rows]
                    num_bytes += self._write_rows(self._stored[target], run, offsets[1:], rows)
        return num_bytes

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        descriptors = list(self._descriptors.values())
        parallel.each(descriptors, lambda descriptor, _: os.fsync(descriptor))

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def _write_rows(self, stored: Stored, run: RowRun, columns: Sequence[int], rows: Tensor) -> int:
        """Write neighbouring rows, or the box's columns of them, chunk by chunk.

        Args:
            stored: the Hugging Face tensor.
            columns: where the box begins in the axes behind the rows.
            rows: the values.
        """
        descriptor = self._descriptors[stored.file]
        row_bytes = stored.num_bytes // stored.shape[0]
        begin = stored.begin + run.hf_row * row_bytes
        is_whole = rows.shape[1:] == stored.shape[1:]
        assert is_whole or rows.dim() == 2, "boxes of matrices"

        num_bytes = 0
        chunk_rows = max(CHUNK_BYTES // row_bytes, 1)
        for at in range(0, len(rows), chunk_rows):
            chunk = rows[at : at + chunk_rows].to("cpu", stored.dtype).contiguous()
            num_bytes += chunk.nbytes
            if is_whole:
                tensor_io.write(chunk, descriptor, begin + at * row_bytes)
            else:
                first_byte = begin + at * row_bytes + columns[0] * stored.dtype.itemsize
                for number, row in enumerate(chunk):
                    tensor_io.write(row, descriptor, first_byte + number * row_bytes)
        return num_bytes
