"""The checksum of a base: the same on every layout, another for weights at other places."""

from __future__ import annotations

import itertools

import pytest
import torch

from miles.convert.base_checksum import sum_of_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def made(dtype: torch.dtype, *sizes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*sizes, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_parts_add_up_wherever_a_tensor_is_divided(dtype: torch.dtype) -> None:
    """Also within a word, of a part that begins anywhere in memory, and of a vector."""
    values = made(dtype, 9, 11)
    whole = int(sum_of_bits(values, (0, 0), dtype))
    for row, column in itertools.product(range(1, 9), range(1, 11)):
        parts = [
            sum_of_bits(values[top:bottom, left:right], (top, left), dtype)
            for top, bottom in ((0, row), (row, 9))
            for left, right in ((0, column), (column, 11))
        ]
        assert int(torch.stack(parts).sum()) == whole
        own = values[row:, column:].contiguous()
        assert sum_of_bits(own, (row, column), dtype) == parts[3]

    vector = values[0]
    parts = [sum_of_bits(vector[:4], (0,), dtype), sum_of_bits(vector[4:], (4,), dtype)]
    assert torch.stack(parts).sum() == sum_of_bits(vector, (0,), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_at_other_places_are_others(dtype: torch.dtype) -> None:
    values = made(dtype, 8, 8)
    others = {"columns": values[:, torch.arange(7, -1, -1)], "rows": values.flip(0)}
    others |= {"transposed": values.T, "both": values.flip(0, 1)}
    for (row, column), at in itertools.product(((0, 0), (3, 4), (2, 5)), range(8)):
        swapped = values.clone()
        swapped[row, column], swapped[row, at] = values[row, at], values[row, column]
        if at != column:
            others[f"{row}, {column} and {at}"] = swapped
    signs = values.clone()
    signs[2, [1, 3]] *= -1
    others["two signs"] = signs

    sums = [int(sum_of_bits(other, (0, 0), dtype)) for other in (values, *others.values())]
    assert len(set(sums)) == 1 + len(others)
    assert sum_of_bits(values[0], (0,), dtype) != sum_of_bits(values[0].flip(0), (0,), dtype)


def test_a_large_tensor_is_summed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = made(torch.bfloat16, 64, 32)
    whole = sum_of_bits(values, (0, 0), torch.bfloat16)
    monkeypatch.setattr("miles.convert.base_checksum._CHUNK_WORDS", 100)
    assert sum_of_bits(values, (0, 0), torch.bfloat16) == whole
