"""The frozen weights of a LoRA run: what tells them from others, whatever the layout.

A checkpoint of such a run holds the adapter alone. Whoever resumes it reads the base again, and the
adapter means nothing beside another one. So `miles.json` has a checksum of the base
(`miles.convert.base_checksum`), which does not depend on the layout.

The bits are those of the precision that the run computes in. From float32 those of the others
follow, so that a run can be resumed in another precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from miles.common.checkpoint_folder import SavedCheckpoint
from miles.common.redact import redact
from miles.convert import base_checksum
from miles.train.model.adapters import is_adapter
from miles.train.model.dtypes import DTYPES
from miles.train.precision import Precision
from miles.train.rank.weight_boxes import WeightBox, weight_boxes

if TYPE_CHECKING:
    from miles.train.rank.trainer import Trainer


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
            checksums[precision.value] = base_checksum.text_of(parts)
        return cls(redact(url), checksums)

    def to_json(self) -> dict[str, Any]:
        """Return it for `miles.json`."""
        return {"url": self.url, "checksums": dict(self.checksums)}

    def require_same(self, checkpoint: SavedCheckpoint) -> None:
        """Refuse to resume an adapter beside other weights than it was trained beside.

        Raises:
            CheckpointError: says which weights are wanted.
        """
        base_checksum.require_same(self.url, self.checksums, checkpoint)


def _checksum(boxes: list[WeightBox], dtype: torch.dtype) -> int:
    """Return the checksum of some boxes, as if they had a dtype. The host waits once."""
    if not boxes:
        return 0
    sums = [base_checksum.sum_of_bits(box.data, box.offsets, dtype) for box in boxes]
    total = 0
    for box, bits in zip(boxes, torch.stack(sums).tolist(), strict=True):
        total += base_checksum.part_of(box.key, box.place, bits)
    return total
