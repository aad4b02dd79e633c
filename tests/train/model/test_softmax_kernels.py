"""The kernels of the softmax, run by Triton's interpreter: what plain torch computes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from miles.train.model import softmax
from tests.support.processes import PROJECT

ROWS = 5
COLUMNS = 9000
"""More than one block of either kernel, and not a multiple."""
LABELS = torch.tensor([0, COLUMNS - 1, -1, COLUMNS, 8192])
"""The rank's first and last column, two of other ranks, and one behind a block's edge."""


def logits(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(ROWS, COLUMNS, generator=generator) * 8
    values[3] = torch.finfo(dtype).min  # a rank that has only rows of padding
    values[0, -3:] = torch.finfo(dtype).min
    return values.to(dtype)


def compare_with_plain_torch() -> None:
    from miles.train.model import softmax_kernels

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        plain = softmax.row_sums(logits(dtype), LABELS)
        sums = softmax_kernels.row_sums(logits(dtype), LABELS)
        torch.testing.assert_close(sums, plain, rtol=1e-5, atol=0)

        scale = torch.tensor(4.0)
        arguments = (LABELS, plain[0], scale / plain[1], scale)
        expected = softmax.turn_into_gradient(logits(dtype), *arguments)
        found = logits(dtype)
        softmax_kernels.turn_into_gradient(found, *arguments)
        assert expected[0, 0] < -3
        tolerance = 1e-5 if dtype is torch.float32 else 1e-2
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-7)


def look_at_rows_that_are_not_finite() -> None:
    from miles.train.model import softmax_kernels

    for value in (float("nan"), float("inf")):
        values = logits(torch.float32)
        values[1, 7] = value
        sums = softmax_kernels.row_sums(values, LABELS)
        assert sums[:2].isfinite().all(0).tolist() == [True, False, True, True, True]


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton comes with torch's CUDA builds"
)
@pytest.mark.parametrize("check", [compare_with_plain_torch, look_at_rows_that_are_not_finite])
def test_kernels_compute_what_plain_torch_does(check: Callable[[], None]) -> None:
    # Triton reads the variable when it is imported, which may have happened in this process.
    subprocess.run(
        [sys.executable, "-c", f"from {__name__} import {check.__name__} as check; check()"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=PROJECT,
        check=True,
    )
