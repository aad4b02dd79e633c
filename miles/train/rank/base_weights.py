"""The frozen weights of a LoRA run: what tells them from others, whatever the layout.

A checkpoint of such a run holds the adapter alone. Whoever resumes it reads the base again, and the
adapter means nothing beside another one. So `miles.json` has a checksum of the base:

    each weight          its bits as an integer, times the number of its row
    each tensor          the sum, times a number that is drawn from its key and its layer
    the base             the sum over all tensors, modulo a prime

Sums do not depend on which rank holds which part. Rows of padding are zeros, and count nothing.

The bits are those of the precision that the run computes in. From float32 those of the others
follow, so that a run can be resumed in another precision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from miles.common.adapter_base import ref_load_line
from miles.common.checkpoint_folder import BASE, SavedCheckpoint
from miles.common.redact import redact
from miles.errors import CheckpointError
from miles.train.model.adapters import is_adapter
from miles.train.model.dtypes import DTYPES
from miles.train.precision import Precision
from miles.train.rank.weight_boxes import WeightBox, weight_boxes

if TYPE_CHECKING:
    from miles.train.rank.trainer import Trainer

_PRIME = (1 << 31) - 1
_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class BaseWeights:
    """The frozen weights beside an adapter."""

    url: str
    """the folder that they were read from"""
    checksums: Mapping[str, str]
    """by precision"""

    @classmethod
    def of(cls, trainer: Trainer, url: str) -> BaseWeights:
        """Return those of a trainer, once they are loaded. Collective."""
        own = trainer.settings.precision
        precisions = list(Precision) if own is Precision.FP32 else [own]
        boxes = [box for box in weight_boxes(trainer.gpt) if not is_adapter(box.key)]
        main_boxes = [box for box in boxes if box.is_main]

        sums = [_checksum(main_boxes, DTYPES[precision]) for precision in precisions]
        gathered: list[Any] = [None] * trainer.layout.world_size
        torch.distributed.all_gather_object(gathered, sums)
        checksums = {}
        for precision, parts in zip(precisions, zip(*gathered, strict=True), strict=True):
            checksums[precision.value] = f"{sum(parts) % _PRIME:08x}"
        return cls(redact(url), checksums)

    def to_json(self) -> dict[str, Any]:
        """Return it for `miles.json`."""
        return {"url": self.url, "checksums": dict(self.checksums)}

    def require_same(self, checkpoint: SavedCheckpoint) -> None:
        """Refuse to resume an adapter beside other weights than it was trained beside.

        Of a precision that the run has not computed in, and that does not follow, nothing is known.

        Raises:
            CheckpointError: says which weights are wanted.
        """
        stated = (checkpoint.extra or {}).get(BASE)
        checksums = stated.get("checksums") if isinstance(stated, dict) else None
        if not isinstance(checksums, dict):
            return
        for precision, checksum in self.checksums.items():
            if checksums.get(precision, checksum) != checksum:
                raise CheckpointError(
                    f"{self.url}: not the weights that the adapter in {checkpoint.url} was trained "
                    "beside: they have another checksum. Give those that it began from, with "
                    f"{ref_load_line(checkpoint)}"
                )


def _checksum(boxes: list[WeightBox], dtype: torch.dtype) -> int:
    """Return the checksum of some boxes, as if they had a dtype. The host waits once."""
    if not boxes:
        return 0
    sums = torch.stack([_sum_of_bits(box.data, box.offsets[0], dtype) for box in boxes])
    total = 0
    for box, bits in zip(boxes, sums.tolist(), strict=True):
        total += _number_of(box) * bits
    return total % _PRIME


def _sum_of_bits(values: Tensor, first_row: int, dtype: torch.dtype) -> Tensor:
    """Return the sum over all values of a box, int64 [], on its device.

    Args:
        first_row: number of its first row in the whole tensor.
    """
    bits = values.to(dtype).contiguous().view(_BITS[dtype.itemsize])
    rows = bits.reshape(len(bits), -1).sum(dim=1, dtype=torch.int64).remainder(_PRIME)
    numbers = torch.arange(first_row + 1, first_row + 1 + len(rows), device=rows.device)
    return (rows * numbers).remainder(_PRIME).sum()


def _number_of(box: WeightBox) -> int:
    """Return the number that a tensor's sum is multiplied with."""
    digest = hashlib.sha256(f"{box.key} {list(box.place)}".encode()).digest()
    return 1 + int.from_bytes(digest[:8]) % (_PRIME - 1)
