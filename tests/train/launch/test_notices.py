"""Flags that are taken, but do not mean what they say: a sentence for each."""

from __future__ import annotations

import pytest

from miles.train.launch.arguments import parse, read_line
from miles.train.launch.fixed_flags import REPLACED

TWO_RANKS = ["--actor-num-gpus-per-node", "2", "--tensor-model-parallel-size", "2"]


def test_a_line_that_means_what_it_says_has_no_notice(base: list[str]) -> None:
    assert read_line(base).notices == ()


def test_sequence_parallelism_without_tensor_ranks_is_left_out(base: list[str]) -> None:
    line = read_line([*base, "--sequence-parallel"])
    assert line.notices == (
        "--sequence-parallel is left out: it spreads tokens over the ranks of "
        "--tensor-model-parallel-size, which is 1",
    )
    assert line.config == parse(base)

    line = read_line([*base, "--sequence-parallel", *TWO_RANKS])
    assert line.notices == ()
    assert line.config.cluster.layout.sequence_parallel


@pytest.mark.parametrize("mask_type", ["qwen", "qwen3"])
def test_a_mask_of_miles_has_a_notice(base: list[str], mask_type: str) -> None:
    line = read_line([*base, "--loss-mask-type", mask_type])
    assert line.notices == (
        f"--loss-mask-type {mask_type} has no effect: the mask is that of the chat template as it "
        f"is served. Miles's {mask_type} mask differs: docs/masks.md",
    )
    assert line.config == parse(base)
    assert read_line([*base, "--loss-mask-type", "auto"]).notices == ()


def test_a_flag_that_chooses_how_to_compute_has_a_notice(base: list[str]) -> None:
    line = read_line([*base, "--moe-permute-fusion", "--make-vocab-size-divisible-by", "128"])
    assert line.notices == (
        "--moe-permute-fusion has no effect: tokens are sorted by expert without a fused kernel",
        "--make-vocab-size-divisible-by has no effect: the vocabulary gets the rows of padding "
        "that the layout needs, which are no tokens",
    )
    assert line.config == parse(base)
    assert all(replaced.notice for replaced in REPLACED)
