"""The number formats of `miles.train.precision` as torch's types."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from miles.train.precision import Precision

DTYPES: Mapping[Precision, torch.dtype] = {
    Precision.FP32: torch.float32,
    Precision.BF16: torch.bfloat16,
    Precision.FP16: torch.float16,
}
