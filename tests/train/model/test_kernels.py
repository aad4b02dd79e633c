"""Elementwise functions against their definitions in float64, and what they keep for the backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from miles.train.model.kernels import rope, silu_mul

TOKENS, HEADS, GROUPS, SIZE = 7, 4, 2, 16


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def angles() -> tuple[Tensor, Tensor]:
    """Return cosine and sine, float64 [TOKENS, SIZE]."""
    half = torch.arange(TOKENS)[:, None] * 10.0 ** -torch.arange(SIZE // 2, dtype=torch.float64)
    angle = torch.cat((half, half), dim=-1)
    return angle.cos(), angle.sin()


def silu_mul_definition(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up[..., :SIZE], gate_and_up[..., SIZE:]
    return gate / (1 + (-gate).exp()) * up


def rope_definition(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply each pair, as a complex number, by the unit of its angle."""
    cos, sin = angles()
    unit = torch.complex(cos, sin)[:, None, : SIZE // 2]

    rotated = []
    for heads in (query, key):
        turned = torch.complex(heads[..., : SIZE // 2], heads[..., SIZE // 2 :]) * unit
        rotated.append(torch.cat((turned.real, turned.imag), dim=-1))
    return rotated[0], rotated[1]


CASES: dict[str, tuple[Callable[..., object], Callable[..., object], list[tuple[int, ...]]]] = {
    "silu_mul": (silu_mul, silu_mul_definition, [(TOKENS, 1, 2 * SIZE)]),
    "rope": (
        lambda query, key: rope(query, key, *angles()),
        rope_definition,
        [(TOKENS, HEADS, SIZE), (TOKENS, GROUPS, SIZE)],
    ),
}
"""Ours, the definition, and the shapes of the arguments."""


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_definitions(name: str) -> None:
    ours, definition, shapes = CASES[name]
    torch.manual_seed(1)
    arguments = [random(*shape) for shape in shapes]

    torch.testing.assert_close(ours(*arguments), definition(*arguments), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(ours, arguments)


def kept(function: Callable[..., object], *arguments: Tensor) -> list[Tensor]:
    """Return the tensors that a function keeps for its backward pass."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(*arguments)
    return found


def test_swiglu_keeps_its_input_only() -> None:
    gate_and_up = random(TOKENS, 2 * SIZE)
    assert [each.data_ptr() for each in kept(silu_mul, gate_and_up)] == [gate_and_up.data_ptr()]


def test_rotation_keeps_no_head() -> None:
    query, key = random(TOKENS, HEADS, SIZE), random(TOKENS, GROUPS, SIZE)
    cos, sin = angles()
    storages = {each.untyped_storage().data_ptr() for each in kept(rope, query, key, cos, sin)}
    assert storages == {cos.data_ptr(), sin.data_ptr()}


def test_bfloat16_is_rotated_in_float32_and_rounded_once() -> None:
    torch.manual_seed(2)
    query = torch.randn(TOKENS, HEADS, SIZE, dtype=torch.bfloat16)
    cos, sin = angles()
    rotated, _ = rope(query, query, cos.float(), sin.float())
    exact, _ = rope(query.double(), query.double(), cos, sin)
    assert rotated.dtype == torch.bfloat16
    torch.testing.assert_close(rotated, exact.bfloat16(), rtol=2**-8, atol=1e-6)


def test_an_expert_without_tokens_has_no_output() -> None:
    nothing = torch.zeros(0, 2 * SIZE, requires_grad=True)
    silu_mul(nothing).sum().backward()
    assert nothing.grad is not None
    assert nothing.grad.shape == (0, 2 * SIZE)
