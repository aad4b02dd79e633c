"""Steps of every family on a GPU against the same steps on a CPU, in float32."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from miles.train.compute_config import AS_USUAL, ComputeConfig
from miles.train.precision import Precision
from tests.support.one_rank import FAMILIES, Numbers, numbers_of

ROUNDING = 2e-4
"""Relative, of float32."""
COARSE = 2e-2
"""Relative, of bfloat16 against float32."""
COARSE_NORM = 8e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_the_cpus(family: str, families: Path, on_cpu: dict[str, Numbers]) -> None:
    expected = on_cpu[family]
    found = numbers_of(families / family, Precision.FP32)

    assert found.answers == expected.answers
    assert found.losses == pytest.approx(expected.losses, rel=ROUNDING)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=10 * ROUNDING)
    assert found.eval_loss == pytest.approx(expected.eval_loss, rel=ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_near_the_cpus(family: str, families: Path, on_cpu: dict[str, Numbers]) -> None:
    expected = on_cpu[family]
    found = numbers_of(families / family, Precision.BF16)

    assert found.losses == pytest.approx(expected.losses, rel=COARSE)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=COARSE_NORM)
    assert found.eval_loss == pytest.approx(expected.eval_loss, rel=COARSE)


SWITCHES = [field.name for field in fields(ComputeConfig) if getattr(AS_USUAL, field.name) is True]
PLAIN = replace(
    AS_USUAL, loss_chunk_size=0, grouped_experts=False, **dict.fromkeys(SWITCHES, False)
)
"""Every switch off."""


@pytest.mark.parametrize("family", ["qwen3-tied", "llama-untied", "qwen3_moe"])
def test_the_plain_way_is_the_cpus(family: str, families: Path, on_cpu: dict[str, Numbers]) -> None:
    found = numbers_of(families / family, Precision.FP32, compute=PLAIN)
    assert found.losses == pytest.approx(on_cpu[family].losses, rel=ROUNDING)
    assert found.grad_norms == pytest.approx(on_cpu[family].grad_norms, rel=10 * ROUNDING)
