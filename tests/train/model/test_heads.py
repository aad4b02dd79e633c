"""Query, key and value out of one product: plain torch, and the kernels by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from miles.train.model.heads import HeadNorms, fused_heads, plain_heads, split_heads
from miles.train.model.rotary import Rotation
from tests.support.processes import PROJECT

CASES = [(2, 4, 16, 19, True), (2, 4, 16, 5, False), (31, 1, 8, 18, True), (1, 1, 16, 33, True)]
"""Groups, queries of a group, head size, tokens, with norms. The third has more heads than one
program of a kernel takes, the tokens are no multiple of a program's."""


def rotation(tokens: int, size: int) -> Rotation:
    angles = torch.rand(tokens, size // 2, generator=torch.Generator().manual_seed(5)) * 6
    angles = torch.cat((angles, angles), dim=-1).double()
    return Rotation(angles.cos(), angles.sin())


def test_heads_are_split_as_megatron_lays_them_out() -> None:
    """Of each group: its queries, its key, its value. Nothing is turned by an angle of 0."""
    mixed = torch.arange(2 * 4 * 2.0)[None]  # 2 groups of 2 queries, head size 2
    still = Rotation(torch.ones(1, 2), torch.zeros(1, 2))
    query, key, value = split_heads(mixed, still, None, 2)
    assert query.tolist() == [[[0, 1], [2, 3], [8, 9], [10, 11]]]
    assert key.tolist() == [[[4, 5], [12, 13]]]
    assert value.tolist() == [[[6, 7], [14, 15]]]


def test_query_and_key_are_normed_and_turned() -> None:
    quarter = Rotation(torch.zeros(1, 2), torch.ones(1, 2))
    norms = HeadNorms(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), 0.0)
    mixed = torch.tensor([[5.0, 5.0, -7.0, -7.0, 9.0, 9.0]])  # one query, key, value
    query, key, value = split_heads(mixed, quarter, norms, 1)
    assert query.tolist() == [[[-2, 1]]]
    assert key.tolist() == [[[4, -3]]]
    assert value.tolist() == [[[9, 9]]]


def outputs_and_gradients(
    dtype: torch.dtype, case: tuple[int, int, int, int, bool], *, is_fused: bool
) -> list[Tensor]:
    """Return query, key and value, and the gradients of the product and of the norms' weights."""
    groups, queries, size, tokens, has_norm = case
    torch.manual_seed(1)
    made = [torch.randn(tokens, groups * (queries + 2) * size)]
    made += [torch.rand(size) + 0.5 for _ in range(2)]
    # Rounded first, so that all kinds compute of the same numbers.
    mixed, *weights = [each.bfloat16().to(dtype).requires_grad_() for each in made]
    norms = HeadNorms(weights[0], weights[1], 1e-6) if has_norm else None

    turn = rotation(tokens, size)
    if is_fused:
        from miles.train.model import heads_kernels

        turn = Rotation(turn.cos.float(), turn.sin.float())
        heads = fused_heads(heads_kernels, mixed, turn, norms, groups)
    else:
        heads = plain_heads(mixed, turn, norms, groups)

    grads = [torch.randn(each.shape).bfloat16().to(dtype) for each in heads]
    inputs = [mixed, *weights] if has_norm else [mixed]
    return [*heads, *torch.autograd.grad(heads, inputs, grads)]


def compare_kernels_with_plain_torch() -> None:
    for case in CASES:
        exact = outputs_and_gradients(torch.float64, case, is_fused=False)
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
            found = outputs_and_gradients(dtype, case, is_fused=True)
            for each, wanted in zip(found, exact, strict=True):
                assert each.dtype == dtype
                bound = tolerance * float(wanted.abs().max())
                torch.testing.assert_close(each.double(), wanted, rtol=0.0, atol=bound)


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton comes with torch's CUDA builds"
)
def test_kernels_compute_what_plain_torch_does() -> None:
    # Triton reads the variable when it is imported, which may have happened in this process.
    check = compare_kernels_with_plain_torch.__name__
    subprocess.run(
        [sys.executable, "-c", f"from {__name__} import {check} as check; check()"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=PROJECT,
        check=True,
    )
