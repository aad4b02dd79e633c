"""The model's sizes on a launch line are compared with config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles.errors import ConfigError
from miles.train.launch.arguments import parse
from miles.train.launch.model_flags import expert_layers
from tests.support.launch import QWEN3_MOE


@pytest.fixture
def experts(base: list[str], tmp_path: Path) -> list[str]:
    """A launch line of a model with experts in each of 4 layers."""
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts/config.json").write_text(json.dumps(QWEN3_MOE))
    return ["--hf-checkpoint", str(tmp_path / "experts"), *base[2:]]


@pytest.mark.parametrize(
    ("written", "layers"),
    [
        ("1", "1111"),
        ("2", "1010"),
        ("[1]*4", "1111"),
        ("[1, 1, 1, 1]", "1111"),
        ("[0,1,1,1,]", "0111"),
        ("[0]*1+[1]*3", "0111"),
        ("[0, 1]*2", "0101"),
    ],
)
def test_layers_with_experts_are_a_number_or_a_list(written: str, layers: str) -> None:
    assert expert_layers(written, 4) == [layer == "1" for layer in layers]


@pytest.mark.parametrize(
    "written", ["", "0", "[2]", "[1", "[]", "[1]**4", "[1]*99999999", "1+[1]", "__import__('os')"]
)
def test_other_words_are_no_layers(written: str) -> None:
    with pytest.raises(ConfigError, match="a number or a list of 0 and 1 was expected"):
        expert_layers(written, 4)


def test_a_long_number_is_no_layers() -> None:
    with pytest.raises(ConfigError, match="a number or a list of 0 and 1 was expected") as caught:
        expert_layers("1" * 5000, 4)
    assert len(str(caught.value)) < 300


def test_a_factor_that_scales_nothing_is_taken(base: list[str]) -> None:
    assert parse([*base, "--rope-scaling-factor", "8"]) == parse(base)
    with pytest.raises(ConfigError, match=r"--use-rope-scaling True: config\.json says False"):
        parse([*base, "--rope-scaling-factor", "8", "--use-rope-scaling"])


@pytest.mark.parametrize("written", ["1", "[1]*4", "[1,1,1,1]"])
def test_the_layers_of_the_model_are_taken(experts: list[str], written: str) -> None:
    assert parse([*experts, "--moe-layer-freq", written]) == parse(experts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--moe-layer-freq 2", r"--moe-layer-freq 2: config.json says \[1\]\*4"),
        ("--moe-layer-freq [0]*1+[1]*3", r"\[0\]\*1\+\[1\]\*3: config.json says \[1\]\*4"),
        ("--moe-layer-freq [1]*3", r"\[1\]\*3: config.json says \[1\]\*4"),
        ("--num-experts 8", "--num-experts 8: config.json says 4"),
        ("--moe-router-pre-softmax", "--moe-router-pre-softmax True: config.json says False"),
        ("--moe-router-topk 4", "--moe-router-topk 4: config.json says 2"),
        ("--max-position-embeddings 9", "--max-position-embeddings 9: config.json says 512"),
        ("--rotary-interleaved", "--rotary-interleaved True: config.json says False"),
        (
            "--moe-router-score-function sigmoid",
            "--moe-router-score-function sigmoid is not supported; leave it out or give softmax",
        ),
        ("--moe-token-drop-policy none", "none: no expert drops tokens; leave it out or give pr"),
        ("--moe-router-topk-scaling-factor 2.5", "2.5 is not supported; leave it out or give 1.0"),
        ("--moe-z-loss-coeff 0.01", "--moe-z-loss-coeff 0.01 is not supported"),
        (
            "--moe-aux-loss-coeff 0.01 --moe-router-load-balancing-type seq_aux_loss",
            "seq_aux_loss beside --moe-aux-loss-coeff 0.01: experts are balanced over all tokens "
            "of a step; leave it out or give aux_loss or global_aux_loss",
        ),
    ],
)
def test_another_size_is_refused(experts: list[str], words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse([*experts, *words.split()])


@pytest.mark.parametrize("kind", ["none", "aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_nothing_is_balanced_by_a_weight_of_0(experts: list[str], kind: str) -> None:
    words = ["--moe-router-load-balancing-type", kind, "--moe-aux-loss-coeff", "0"]
    assert parse([*experts, *words]) == parse(experts)


@pytest.mark.parametrize("kind", ["", "aux_loss", "global_aux_loss"])
def test_experts_are_balanced_over_a_step(experts: list[str], kind: str) -> None:
    words = ["--moe-router-load-balancing-type", kind] if kind else []
    config = parse([*experts, *words, "--moe-aux-loss-coeff", "0.01"])
    assert config.optimizer.moe_aux_loss_coeff == 0.01


def test_a_dense_model_has_no_layer_with_experts(base: list[str]) -> None:
    assert parse([*base, "--moe-layer-freq", "[0]*36"]) == parse(base)
    with pytest.raises(ConfigError, match=r"--moe-layer-freq 1: config.json says \[0\]\*36"):
        parse([*base, "--moe-layer-freq", "1"])
