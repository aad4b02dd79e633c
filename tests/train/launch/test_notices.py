"""Flags that are taken, but do not mean what they say: a sentence for each."""

from __future__ import annotations

import pytest

from miles.train.launch.arguments import parse, read_line
from miles.train.launch.fixed_flags import REPLACED
from tests.support.fault_table import NOTHING, observed

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


@pytest.mark.parametrize(
    ("line", "notice"),
    [
        (
            "--lr-decay-style constant --min-lr 1e-6",
            "--min-lr has no effect: with --lr-decay-style",
        ),
        ("--rollout-seed 7", "--rollout-seed has no effect: rows come in the order of their files"),
        ("--shuffle-window 64", "--shuffle-window has no effect: rows come in the order of"),
        ("--wandb-project x", "--wandb-project has no effect: nothing is sent to Weights & Biases"),
        ("--wandb-key hunter2", "--wandb-key has no effect: nothing is sent to Weights & Biases"),
        ("--eval-max-response-len 9", "--eval-max-response-len has no effect: no answer is"),
        ("--on-save-error continue", "--on-save-error continue has no effect: without"),
        (
            "--no-overlap-grad-reduce --ddp-bucket-size 5",
            "--ddp-bucket-size has no effect: nothing is overlapped",
        ),
        ("--no-rope-fusion --norm-fusion", "--norm-fusion has no effect: norms are computed in"),
    ],
)
def test_a_flag_that_does_nothing_beside_the_others(
    base: list[str], line: str, notice: str
) -> None:
    (found,) = read_line([*base, *line.split()]).notices
    assert found.startswith(notice)
    assert "hunter2" not in found
    if line.startswith("--wandb-project"):
        observed("flag without an effect beside the others", found, "has no effect", NOTHING)


def test_a_flag_that_has_its_effect_has_no_notice(base: list[str]) -> None:
    line = """--lr-decay-style cosine --min-lr 1e-6 --rollout-shuffle --rollout-seed 7
        --shuffle-window 64 --use-wandb --wandb-project x --eval-fraction 0.1 --eval-samples 1
        --eval-max-response-len 9 --save-interval 5 --on-save-error continue --ddp-bucket-size 5
        --norm-fusion"""
    assert read_line([*base, *line.split()]).notices == ()


def test_a_flag_that_is_given_twice(base: list[str]) -> None:
    line = "--lr 1e-5 --lr 1e-5 --seed 1 --seed 2 --wandb-key=--a --wandb-key=--b --use-wandb"
    found = read_line([*base, *line.split()])
    assert found.notices == (
        "--seed is given 2 times; the last value counts",
        "--wandb-key is given 2 times; the last value counts",
    )
    assert found.config.seed == 2
    observed("flag given twice", found.notices[0], "the last value counts", NOTHING)
