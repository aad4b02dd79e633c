"""Dropout by arithmetic: the share is right, and each part of an element's place counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from miles.data.packing.micro_batch import micro_batch
from miles.data.types import MicroBatch
from miles.train.model.adapter_dropout import Dropout, channel_keys, token_keys
from miles.train.model.device_batch import send

SHARE = 0.1
LENGTHS = (60, 40, 28)
NUM_CHANNELS = 96


def rows(*row_ids: int) -> MicroBatch:
    """Return a micro-batch of rows, each of another length."""
    lengths = np.array([LENGTHS[row] for row in row_ids])
    ids = np.zeros(lengths.sum(), np.int32)
    numbers = np.array(row_ids, np.int64)
    return micro_batch(ids, np.ones_like(ids, np.uint8), lengths, numbers, numbers * 0)


def dropped(
    packed: MicroBatch,
    *,
    seed: int = 3,
    step: int = 0,
    layer: int = 0,
    target: str = "q_proj",
    first_channel: int = 0,
    num_channels: int = NUM_CHANNELS,
    share: float = SHARE,
) -> torch.Tensor:
    """Return what is dropped of an input, bool [tokens, channels]."""
    tokens = token_keys(send(packed), seed, step)
    channels = channel_keys(first_channel, num_channels)
    return Dropout.of(tokens, layer, target, channels, share).dropped()


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.9])
def test_the_share_is_dropped_of_each_token_and_channel(share: float) -> None:
    mask = dropped(rows(0, 1, 2), num_channels=4096, share=share).double()
    deviation = (share * (1 - share)) ** 0.5
    assert abs(mask.mean() - share) < 4 * deviation / mask.numel() ** 0.5
    for axis, size in enumerate(mask.shape):
        means = mask.mean(1 - axis)
        expected = deviation / (mask.numel() / size) ** 0.5
        assert means.std() == pytest.approx(expected, rel=0.3)


def test_neighbours_are_dropped_independently() -> None:
    mask = dropped(rows(0, 1, 2), num_channels=4096, share=0.5).double() - 0.5
    bound = 4 * 0.25 / mask.numel() ** 0.5
    assert abs((mask[1:] * mask[:-1]).mean()) < bound
    assert abs((mask[:, 1:] * mask[:, :-1]).mean()) < bound
    square = mask[1:, 1:] * mask[:-1, :-1] * mask[1:, :-1] * mask[:-1, 1:]
    assert abs(square.mean()) < 4 * 0.0625 / mask.numel() ** 0.5


@pytest.mark.parametrize(
    "place",
    [{"seed": 4}, {"step": 1}, {"layer": 1}, {"target": "k_proj"}, {"first_channel": 5_000}],
    ids=str,
)
def test_each_part_of_the_place_counts(place: dict[str, int]) -> None:
    mask = dropped(rows(0, 1))
    changed = dropped(rows(0, 1), **place)  # type: ignore[arg-type]
    both = (mask & changed).double().mean()
    assert both == pytest.approx(SHARE**2, rel=0.5)


def test_tokens_keep_theirs_wherever_they_are_packed() -> None:
    together = dropped(rows(0, 1, 2)).split(LENGTHS)
    backwards = dropped(rows(2, 0)).split([LENGTHS[2], LENGTHS[0]])
    assert torch.equal(backwards[0], together[2])
    assert torch.equal(backwards[1], together[0])
    assert not torch.equal(together[0][:20], together[1][:20])

    padded = replace(rows(1), row_ids=np.array([2**40 + 1]))
    assert not torch.equal(dropped(padded), together[1]), "a row id has 64 bits"


def test_channels_keep_theirs_on_each_rank() -> None:
    whole = dropped(rows(0))
    half = NUM_CHANNELS // 2
    assert torch.equal(dropped(rows(0), first_channel=half, num_channels=half), whole[:, half:])


def test_a_product_has_the_gradients_of_its_mask() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(sum(LENGTHS), NUM_CHANNELS, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, NUM_CHANNELS, dtype=torch.float64, requires_grad=True)
    tokens = token_keys(send(rows(0, 1, 2)), seed=3, step=0)
    dropout = Dropout.of(tokens, 0, "q_proj", channel_keys(0, NUM_CHANNELS), SHARE)

    kept = ~dropout.dropped()
    expected = (inputs * kept / (1 - SHARE)) @ weight.t()
    product = dropout.product(inputs, weight)
    torch.testing.assert_close(product, expected)
    grad = torch.randn_like(product)
    for own, other in zip(
        torch.autograd.grad(product, (inputs, weight), grad),
        torch.autograd.grad(expected, (inputs, weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(own, other)
