"""The bytes of the optimizer's state for a parameter, by its flags."""

from __future__ import annotations

from typing import Any

import pytest

from miles.train.estimate.memory import state_bytes
from miles.train.optimizer_settings import OptimizerSettings
from miles.train.precision import Precision

AWARE = {"precision_aware": True}
OFFLOADED = {**AWARE, "cpu_offload": True}


@pytest.mark.parametrize(
    ("fields", "precision", "device", "host"),
    [
        # two moments, and a master weight where the weights have 16 bits
        ({}, Precision.FP32, 8, 0),
        ({}, Precision.BF16, 12, 0),
        ({}, Precision.FP16, 12, 0),
        # Transformer Engine keeps the lower half of the master weight beside a bfloat16 weight
        (AWARE, Precision.BF16, 10, 0),
        (AWARE, Precision.FP16, 12, 0),
        ({**AWARE, "main_params_dtype": "fp16"}, Precision.FP16, 10, 0),
        ({**AWARE, "exp_avg_dtype": "bf16"}, Precision.BF16, 8, 0),
        ({**AWARE, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "fp16"}, Precision.BF16, 6, 0),
        # with a gradient beside them in the machine's memory
        (OFFLOADED, Precision.BF16, 0, 16),
        ({**OFFLOADED, "offload_fraction": 0.25}, Precision.BF16, 9, 4),
    ],
)
def test_state_of_a_parameter(
    fields: dict[str, Any], precision: Precision, device: float, host: float
) -> None:
    counted = state_bytes(precision, OptimizerSettings(**fields))
    assert (counted.device, counted.host) == (device, host)
