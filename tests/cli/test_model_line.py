"""The line of Miles's converter, with its model scripts' flags, is the line of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles.cli import main
from miles.convert.verify import verify
from miles.demo.model import TinySizes, build_model
from tests.support.streams import demo_tokenizer

MODEL_ARGS = """
    --swiglu --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --use-rotary-position-embeddings
    --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6 --vocab-size 2048
    --kv-channels 16 --qk-layernorm --attention-dropout 0.0 --no-rope-fusion
    --no-bias-swiglu-fusion --transformer-impl transformer_engine --moe-grouped-gemm
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 8
"""


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3 with the sizes of `MODEL_ARGS`."""
    folder = tmp_path_factory.mktemp("hf")
    sizes = TinySizes(
        hidden_size=64, ffn_hidden_size=128, num_layers=2, num_query_groups=2, kv_channels=16
    )
    build_model(demo_tokenizer(), folder / "hf", sizes=sizes)
    return folder / "hf"


def convert(hf: Path, save: Path, *words: str) -> int:
    line = ["--hf-checkpoint", str(hf), "--save", str(save)]
    return main(["convert", "hf-to-megatron", *MODEL_ARGS.split(), *line, *words])


def test_the_line_of_miles_converts(hf: Path, tmp_path: Path) -> None:
    assert convert(hf, tmp_path / "megatron") == 0
    assert not verify(str(hf), str(tmp_path / "megatron")).differences


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-layers 3", "--num-layers 3: config.json says 2"),
        ("--hidden-size 128", "--hidden-size 128: config.json says 64"),
        ("--moe-layer-freq [1,1]", "--moe-layer-freq [1,1]: config.json says [0]*2"),
        ("--normalization LayerNorm", "--normalization LayerNorm is not supported"),
        (
            "--padded-vocab-size 2047",
            "--padded-vocab-size 2047 is less than the vocabulary of 2048",
        ),
        ("--spec a b", "--spec names a model of your own; leave it out"),
        ("--kl-coef 0.1", "--kl-coef belongs to the loss of reinforcement learning"),
        ("--lr=3", "--lr says nothing about a conversion; leave it out"),
        ("--hiden-size 64", "there is no flag --hiden-size; did you mean --hidden-size?"),
    ],
)
def test_another_line_is_refused(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert convert(hf, tmp_path / "megatron", *words.split()) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "megatron").exists()


def test_the_embedding_gets_as_many_rows_as_are_named(hf: Path, tmp_path: Path) -> None:
    import torch

    assert json.loads((hf / "config.json").read_text())["vocab_size"] == 2048
    assert convert(hf, tmp_path / "megatron", "--padded-vocab-size", "3000") == 0
    common = torch.load(tmp_path / "megatron/release/common.pt", weights_only=False)
    assert common["args"].padded_vocab_size == 3000
