"""A micro-batch on the device: everything that a step needs of it, sent once.

    MicroBatch -> one buffer of bytes on the host -> the same buffer on the device -> DeviceBatch

On a GPU the host's buffer is pinned and the copy runs on a stream of its own, one micro-batch ahead
of the computation, so that neither the host nor the GPU waits for it:

    copies         0  1     2     3
    computation       0     1     2     3

On a CPU the tensors are views of the host's buffer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from miles.common.offsets import offsets_of
from miles.data.types import MicroBatch
from miles.train.model import device
from miles.train.model.long_segments import is_long

_ALIGNMENT_BYTES = 64
"""Each array of the buffer begins at a multiple of it: aligned data is read in larger pieces."""


_TORCH_DTYPES = {"int64": torch.int64, "int32": torch.int32, "float32": torch.float32}


@dataclass(frozen=True)
class DeviceBatch:
    """A micro-batch of tensors on the device, with what is known of it on the host."""

    input_ids: Tensor
    """int64 [1, tokens]"""
    labels: Tensor
    """int64 [1, tokens]: the next token of the same segment; 0 at a segment's last position"""
    position_ids: Tensor
    """int64 [1, tokens]: 0, 1, 2, … within each segment"""
    loss_mask: Tensor
    """float32 [tokens]: 1 where the label is trained"""
    trained_positions: Tensor
    """int64 [trained tokens]: where `loss_mask` is above 0, ascending"""
    cu_seqlens: Tensor
    """int32 [segments + 1]: where each segment begins, and the end of the last"""
    short_cu_seqlens: Tensor
    """int32 [short segments + 1]: the same of the segments that are not long (`long_segments`),
    as if they lay end to end"""
    segment_of_token: Tensor
    """int64 [tokens]: 0 for the tokens of the first segment, 1 for those of the second, …"""
    source_of_segment: Tensor
    """int64 [segments]"""
    row_of_segment: Tensor
    """int64 [segments]: the row id of each"""
    longest: int
    """tokens of the longest segment"""
    num_trained: int
    """trained tokens"""
    host: MicroBatch
    """the arrays it was made of"""


def send(micro_batch: MicroBatch) -> DeviceBatch:
    """Return a micro-batch on the device, ready for the current stream.

    Args:
        micro_batch: padded for the tensor-parallel ranks (`pad_for_tensor_ranks`).
    """
    return _begin(micro_batch).wait()


def send_ahead(micro_batches: Iterable[MicroBatch]) -> Iterator[DeviceBatch]:
    """Yield micro-batches on the device, each ready for the current stream.

    The copy of the next one is under way when one is handed out.

    Args:
        micro_batches: padded for the tensor-parallel ranks (`pad_for_tensor_ranks`).
    """
    under_way: _Transfer | None = None
    for micro_batch in micro_batches:
        following = _begin(micro_batch)
        if under_way is not None:
            yield under_way.wait()
        under_way = following

    if under_way is not None:
        yield under_way.wait()


@dataclass(frozen=True)
class _Transfer:
    """A micro-batch on its way to the device."""

    batch: DeviceBatch
    buffer: Tensor
    """uint8 [bytes], on the device: the memory of all tensors of the batch"""
    arrived: torch.cuda.Event | None
    """recorded behind the copy; None on a CPU, where there is none"""

    def wait(self) -> DeviceBatch:
        """Have the current stream wait for the copy, the host not, and return the batch."""
        if self.arrived is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.arrived)
            # The memory was allocated for the stream of the copies. The allocator must not reuse it
            # before this stream is done with it.
            self.buffer.record_stream(stream)
        return self.batch


def _begin(micro_batch: MicroBatch) -> _Transfer:
    """Begin the copy of a micro-batch to the device."""
    parts = _parts(micro_batch)
    on_host = torch.from_numpy(_packed(parts))

    if device.has_gpu():
        stream = _copy_stream()
        with torch.cuda.stream(stream):
            # The allocator of pinned memory keeps the host's buffer until the copy is done.
            buffer = on_host.pin_memory().to("cuda", non_blocking=True)
            arrived = stream.record_event()
    else:
        buffer, arrived = on_host, None

    return _Transfer(_unpacked(micro_batch, parts, buffer), buffer, arrived)


@functools.cache
def _copy_stream() -> torch.cuda.Stream:
    """Return this process's stream for copies to the GPU."""
    return torch.cuda.Stream()


@dataclass(frozen=True)
class _Part:
    """An array and its place in the buffer."""

    array: np.ndarray
    start: int
    """the first byte"""

    @property
    def end(self) -> int:
        return self.start + self.array.nbytes


def _parts(micro_batch: MicroBatch) -> dict[str, _Part]:
    """Return the arrays that are sent, by their field in `DeviceBatch`."""
    lengths = np.diff(micro_batch.cu_seqlens)
    short_lengths = [length for length in lengths.tolist() if not is_long(length)]
    arrays: dict[str, np.ndarray] = {
        "input_ids": micro_batch.input_ids,
        "labels": micro_batch.labels,
        "position_ids": micro_batch.position_ids,
        "loss_mask": micro_batch.loss_mask,
        "trained_positions": np.flatnonzero(micro_batch.loss_mask > 0).astype(np.int64),
        "cu_seqlens": micro_batch.cu_seqlens.astype(np.int32),
        "short_cu_seqlens": offsets_of(np.array(short_lengths, np.int64)).astype(np.int32),
        "segment_of_token": np.repeat(np.arange(len(lengths), dtype=np.int64), lengths),
        "source_of_segment": micro_batch.source_ids.astype(np.int64),
        "row_of_segment": micro_batch.row_ids.astype(np.int64),
    }

    parts = {}
    start = 0
    for name, array in arrays.items():
        parts[name] = _Part(array, start)
        start += -(-array.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return parts


def _packed(parts: dict[str, _Part]) -> np.ndarray:
    """Return all arrays in one buffer, uint8 [bytes]."""
    buffer = np.zeros(max(part.end for part in parts.values()), np.uint8)
    for part in parts.values():
        buffer[part.start : part.end].view(part.array.dtype)[:] = part.array
    return buffer


def _unpacked(micro_batch: MicroBatch, parts: dict[str, _Part], buffer: Tensor) -> DeviceBatch:
    """Return the batch whose tensors are views of a buffer on the device."""

    def view(name: str) -> Tensor:
        part = parts[name]
        return buffer[part.start : part.end].view(_TORCH_DTYPES[part.array.dtype.name])

    return DeviceBatch(
        input_ids=view("input_ids")[None],
        labels=view("labels")[None],
        position_ids=view("position_ids")[None],
        loss_mask=view("loss_mask"),
        trained_positions=view("trained_positions"),
        cu_seqlens=view("cu_seqlens"),
        short_cu_seqlens=view("short_cu_seqlens"),
        segment_of_token=view("segment_of_token"),
        source_of_segment=view("source_of_segment"),
        row_of_segment=view("row_of_segment"),
        longest=int(np.diff(micro_batch.cu_seqlens).max()),
        num_trained=len(parts["trained_positions"].array),
        host=micro_batch,
    )
