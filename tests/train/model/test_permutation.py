"""Copies of tokens for experts, and back, against the plain definitions."""

from __future__ import annotations

import torch
from torch import Tensor

from miles.train.model.permutation import route, sort_chunks

TOKENS, EXPERTS, CHOICES, WIDTH = 9, 5, 2, 4


def chosen_experts() -> Tensor:
    """Return two experts of each token, bool [TOKENS, EXPERTS]. No token chooses expert 3."""
    torch.manual_seed(1)
    chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    for token in chosen:
        token[torch.tensor([0, 1, 2, 4])[torch.randperm(4)[:CHOICES]]] = True
    return chosen


def test_the_example_of_the_docstring() -> None:
    chosen = torch.zeros(2, 4, dtype=torch.bool)
    chosen[0, [1, 3]] = chosen[1, [1, 2]] = True
    permutation = route(chosen, 2).permutation
    assert permutation.source.tolist() == [0, 1, 1, 0]
    assert permutation.positions.tolist() == [[0, 3], [1, 2]]


def test_copies_are_sorted_by_expert_and_token() -> None:
    chosen = chosen_experts()
    routing = route(chosen, CHOICES)
    experts, tokens = chosen.T.nonzero().T
    assert routing.permutation.source.equal(tokens)

    rows = torch.randn(TOKENS, WIDTH)
    assert routing.permutation.copy(rows).equal(rows[tokens])
    table = torch.rand(TOKENS, EXPERTS)
    assert routing.of_copies(table).equal(table[tokens, experts])


def test_each_token_gets_the_sum_of_its_copies() -> None:
    permutation = route(chosen_experts(), CHOICES).permutation
    copies = torch.randn(TOKENS * CHOICES, WIDTH)
    sums = torch.zeros(TOKENS, WIDTH).index_add(0, permutation.source, copies)
    torch.testing.assert_close(permutation.add_up(copies), sums)


def test_copying_and_adding_are_each_others_derivative() -> None:
    routing = route(chosen_experts(), CHOICES)
    rows = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    copies = torch.randn(TOKENS * CHOICES, WIDTH, dtype=torch.float64, requires_grad=True)
    table = torch.rand(TOKENS, EXPERTS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(routing.permutation.copy, rows)
    assert torch.autograd.gradcheck(routing.permutation.add_up, copies)
    assert torch.autograd.gradcheck(routing.of_copies, table)


def test_received_rows_are_sorted_by_group() -> None:
    """Of two senders and three groups: the second sends nothing to group 1, none to group 2."""
    sizes = torch.tensor([[1, 3, 0], [2, 0, 0]])
    rows = torch.tensor([10.0, 11.0, 12.0, 13.0, 20.0, 21.0], requires_grad=True)
    permutation = sort_chunks(sizes, len(rows))
    by_group = permutation.copy(rows)
    assert by_group.tolist() == [10, 20, 21, 11, 12, 13]
    assert permutation.add_up(by_group).equal(rows)
    assert torch.autograd.gradcheck(permutation.copy, rows.detach().double().requires_grad_())


def test_no_row_was_received() -> None:
    permutation = sort_chunks(torch.zeros(2, 3, dtype=torch.int64), 0)
    assert permutation.copy(torch.zeros(0, WIDTH)).shape == (0, WIDTH)
    assert permutation.add_up(torch.zeros(0, WIDTH)).shape == (0, WIDTH)
