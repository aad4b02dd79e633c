"""Launch lines -> configuration, and mistakes in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles.errors import ConfigError
from miles.train.arguments import parse

CONFIG = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return ["--hf-checkpoint", str(tmp_path), "--prompt-data", "rows.parquet", "--save", "run"]


def test_an_sft_launch_line_of_miles_runs(base: list[str]) -> None:
    config = parse(
        [
            *base,
            *["--rollout-function-path", "miles.rollout.sft_rollout.generate_rollout", "--loss-type", "sft_loss"],
            *["--calculate-per-token-loss", "--disable-compute-advantages-and-returns", "--debug-train-only"],
            *[
                "--rollout-shuffle",
                "--rollout-seed",
                "7",
                "--num-epoch",
                "3",
                "--rollout-batch-size",
                "128",
                "--global-batch-size",
                "128",
            ],
            *["--use-dynamic-batch-size", "--max-tokens-per-gpu", "9216", "--actor-num-gpus-per-node", "8"],
            *[
                "--tensor-model-parallel-size",
                "2",
                "--lr",
                "1e-5",
                "--lr-decay-style",
                "cosine",
                "--lr-warmup-iters",
                "100",
            ],
            *[
                "--swiglu",
                "--num-layers",
                "36",
                "--hidden-size",
                "2560",
                "--group-query-attention",
                "--num-query-groups",
                "8",
            ],
            *["--kv-channels", "128", "--qk-layernorm", "--normalization", "RMSNorm", "--rotary-base", "1000000"],
        ]
    )
    assert (config.data.order.batch_size, config.data.order.seed, config.data.order.shuffle) == (128, 7, True)
    assert config.data.pack.dp_size == 4
    assert config.data.encode.max_sample_tokens == config.data.pack.max_tokens_per_gpu == 9216
    assert (config.optimizer.lr, config.optimizer.lr_warmup_iters) == (1e-5, 100)
    assert config.run_dir == "run"


def test_a_mixture_is_name_path_pairs(base: list[str]) -> None:
    config = parse([*base, "--prompt-data", "hermes", "a.parquet", "orca", "b.parquet"])
    assert [(source.name, source.paths) for source in config.data.sources] == [
        ("hermes", ("a.parquet",)),
        ("orca", ("b.parquet",)),
    ]


def test_yaml_gives_flags_and_the_line_has_the_last_word(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("num_epoch: 2\nrollout-shuffle: true\nlr: 3.0e-5\n")
    config = parse(["--config", str(tmp_path / "run.yaml"), *base, "--num-epoch", "5"])
    assert (config.data.order.num_epoch, config.data.order.shuffle, config.optimizer.lr) == (5, True, 3e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--loss-type policy_loss", "--loss-type policy_loss: this is SFT only"),
        ("--rollout-batch-size 8 --global-batch-size 16", "must be equal"),
        ("--advantage-estimator grpo", "unrecognized arguments: --advantage-estimator"),
        ("--lr-decay-style wavy", "--lr-decay-style must be one of"),
        ("--max-sample-tokens 9000 --max-tokens-per-gpu 8000", "--max-sample-tokens 9000 exceeds"),
        ("--num-layers 28", "--num-layers 28: config.json says 36"),
        ("--context-parallel-size 2", "--context-parallel-size 2 is not supported"),
        ("--sequence-parallel", "--sequence-parallel is not supported yet"),
        ("--actor-num-gpus-per-node 3 --tensor-model-parallel-size 2", "3 ranks .* cannot be divided"),
        ("--empty-think maybe", "--empty-think must be one of mask, train"),
        ("--apply-chat-template-kwargs [1]", "a JSON object was expected"),
        ("--prompt-data a b c", "--prompt-data takes one path, or NAME PATH pairs"),
        ("--chat-template-path nowhere.jinja", "nowhere.jinja: no such file"),
        ("--config nowhere.yaml", "nowhere.yaml: no such file"),
        ("--lr five", "invalid float value: 'five'"),
        ("--num-epoch 0", "--num-epoch must be positive"),
    ],
)
def test_a_mistake_is_named(base: list[str], words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse([*base, *words.split()])


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="--prompt-data is missing"):
        parse(["--save", "run"])
