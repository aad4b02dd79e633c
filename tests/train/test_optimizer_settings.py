"""The flags of the optimizer's memory, against one another."""

from __future__ import annotations

from typing import Any

import pytest

from miles.errors import ConfigError
from miles.train.optimizer_settings import OptimizerSettings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cpu_offload": True}, "--optimizer-cpu-offload needs --use-precision-aware-optimizer"),
        ({"overlap_offload": True}, "--overlap-cpu-optimizer-d2h-h2d goes with --optimizer-cpu"),
        ({"offload_fraction": 0.5}, "--optimizer-offload-fraction goes with --optimizer-cpu-off"),
        (
            {"cpu_offload": True, "precision_aware": True, "offload_fraction": 0.0},
            r"--optimizer-offload-fraction must be in \(0, 1\], not 0.0",
        ),
        (
            {"cpu_offload": True, "precision_aware": True, "offload_fraction": 1.5},
            r"--optimizer-offload-fraction must be in \(0, 1\], not 1.5",
        ),
        ({"exp_avg_dtype": "bf16"}, "--exp-avg-dtype bf16 goes with --use-precision-aware-opt"),
        ({"main_params_dtype": "fp16"}, "--main-params-dtype fp16 goes with --use-precision-aw"),
        (
            {"cpu_offload": True, "precision_aware": True, "exp_avg_sq_dtype": "fp16"},
            "--exp-avg-sq-dtype fp16: what --optimizer-cpu-offload keeps .* is float32",
        ),
        ({"exp_avg_dtype": "fp8"}, "--exp-avg-dtype must be one of fp32, fp16, bf16, not 'fp8'"),
    ],
)
def test_a_contradiction_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerSettings(**fields)


def test_the_flags_of_a_large_model_go_together() -> None:
    settings = OptimizerSettings(precision_aware=True, cpu_offload=True, overlap_offload=True)
    assert settings.offload_fraction == 1.0
    assert OptimizerSettings(precision_aware=True, exp_avg_dtype="bf16").exp_avg_dtype == "bf16"
