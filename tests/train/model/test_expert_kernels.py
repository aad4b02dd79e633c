"""The kernels around the experts' products, run by Triton's interpreter: what plain torch does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from miles.train.model import kernels
from miles.train.model.permutation import Permutation
from miles.train.model.weighted_swiglu import weighted_swiglu
from tests.support.processes import PROJECT

ROWS = 6
SIZE = 24
"""Not a power of two, as the blocks of the kernels are."""
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 2**-7}
"""Relative bounds. The interpreter cuts bfloat16 off where a GPU rounds."""


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def compare_swiglu() -> None:
    from miles.train.model import expert_kernels

    for dtype, bound in DTYPES.items():
        gate_and_up, grad = draw(ROWS, 2 * SIZE).to(dtype), draw(ROWS, SIZE).to(dtype)
        weights = draw(ROWS).sigmoid()
        exact = [gate_and_up.double().requires_grad_(), weights.double().requires_grad_()]
        expected = weighted_swiglu(*exact)
        grads = torch.autograd.grad(expected, exact, grad.double())

        product = expert_kernels.weighted_swiglu(gate_and_up, weights)
        found = expert_kernels.weighted_swiglu_grads(gate_and_up, weights, grad)
        assert [each.dtype for each in (product, *found)] == [dtype, dtype, torch.float32]
        for one, other in zip((product, *found), (expected, *grads), strict=True):
            torch.testing.assert_close(one.double(), other.detach(), rtol=bound, atol=1e-5)


def compare_sums_of_copies() -> None:
    from miles.train.model import expert_kernels

    width = 2100  # more than a block
    positions = torch.randperm(12, generator=torch.Generator().manual_seed(1)).view(4, 3)
    for dtype, bound in DTYPES.items():
        copies = draw(12, width).to(dtype)
        sums = expert_kernels.add_up_copies(copies, positions)
        exact = Permutation(positions, positions).add_up(copies.double())
        torch.testing.assert_close(sums.double(), exact, rtol=bound, atol=1e-5)


def compare_added_gradients() -> None:
    from miles.train.model import expert_kernels

    num_groups, size, step = 4, 5000, 5064  # more than a block, and a gap
    ends = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    for dtype in DTYPES:
        grads = draw(num_groups, 50, 100).to(dtype)
        grads[0] = grads[2] = torch.nan  # of no rows: whatever was there
        buffer = draw(num_groups * step)
        expected = buffer.clone()
        for group in (1, 3):
            expected[group * step : group * step + size] += grads[group].float().flatten()

        sums = buffer.as_strided((num_groups, 50, 100), (step, 100, 1))
        expert_kernels.add_to_sums(sums, grads, ends)
        assert buffer.equal(expected)


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton comes with torch's CUDA builds"
)
@pytest.mark.parametrize("check", [compare_swiglu, compare_sums_of_copies, compare_added_gradients])
def test_kernels_compute_what_plain_torch_does(check: Callable[[], None]) -> None:
    # Triton reads the variable when it is imported, which may have happened in this process.
    subprocess.run(
        [sys.executable, "-c", f"from {__name__} import {check.__name__} as check; check()"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=PROJECT,
        check=True,
    )


def test_experts_need_triton_and_no_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        on_gpu = torch.ones(1, 16, device="cuda")
        monkeypatch.setattr(kernels, "_runs_triton", lambda: True)
        monkeypatch.setattr(kernels, "_kernels_on_gpu", lambda: None)  # of liger-kernel
        assert kernels.has_fused_kernels(on_gpu)
        assert not kernels.has_fused_kernels(torch.ones(0, 16, device="cuda"))
        assert not kernels.has_fused_kernels(on_gpu.new_ones(1, dtype=torch.float64))

        monkeypatch.setattr(kernels, "_runs_triton", lambda: False)
        assert not kernels.has_fused_kernels(on_gpu)
