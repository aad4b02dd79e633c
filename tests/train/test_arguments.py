"""Launch lines -> configuration, and mistakes in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles.data.config import DataConfig, EncodeConfig, RowFormat
from miles.errors import ConfigError
from miles.train.arguments import build_parser, parse

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


def test_what_the_rows_look_like(base: list[str]) -> None:
    assert [source.format for source in parse(base).data.sources] == [RowFormat()]
    config = parse(
        [*base, "--prompt-data", "a", "a.parquet", "b", "b.parquet", "--input-key", "chat", "--tool-key", "fs"]
    )
    assert [source.format for source in config.data.sources] == 2 * [
        RowFormat("auto", {"messages": "chat", "tools": "fs"})
    ]
    config = parse(
        [
            *base,
            *["--row-shape", "prompt_completion", "--column-names", '{"prompt": "q"}', "--tool-key", "fs"],
            *["--role-names", '{"Bot": "assistant"}'],
        ]
    )
    assert config.data.sources[0].format == RowFormat(
        "prompt_completion", {"prompt": "q", "tools": "fs"}, {"Bot": "assistant"}
    )


def test_policies_of_the_data(base: list[str]) -> None:
    config = parse(base)
    assert config.data.encode == EncodeConfig(base[1], max_sample_tokens=config.data.pack.max_tokens_per_gpu)
    assert config.data.max_bad_rows_in_a_row == DataConfig.max_bad_rows_in_a_row
    config = parse(
        [
            *base,
            *["--loss-mask-turns", "flags", "--empty-think", "train", "--history", "as_served"],
            *["--special-text", "escape", "--too-long", "truncate_end", "--trust-remote-code"],
            *["--max-bad-rows-in-a-row", "7", "--max-sample-tokens", "99"],
        ]
    )
    encode = config.data.encode
    assert (encode.turns, encode.empty_think, encode.history) == ("flags", "train", "as_served")
    assert (encode.special_text, encode.too_long, encode.trust_remote_code) == ("escape", "truncate_end", True)
    assert (config.data.max_bad_rows_in_a_row, encode.max_sample_tokens) == (7, 99)


def test_each_flag_of_the_rows_has_a_help_text() -> None:
    flags = {action.option_strings[-1]: action.help for action in build_parser()._actions}
    for name in (
        *("--input-key", "--tool-key", "--row-shape", "--column-names", "--role-names", "--loss-mask-turns"),
        *("--empty-think", "--history", "--special-text", "--too-long", "--trust-remote-code"),
        *("--max-bad-fraction", "--max-bad-rows-in-a-row"),
    ):
        assert flags[name], name
    build_parser().format_help()  # raises where a help text is not to be formatted


def test_yaml_gives_flags_and_the_line_has_the_last_word(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("num_epoch: 2\nrollout-shuffle: true\nlr: 3.0e-5\nrole-names: {a: user}\n")
    config = parse(["--config", str(tmp_path / "run.yaml"), *base, "--num-epoch", "5"])
    assert (config.data.order.num_epoch, config.data.order.shuffle, config.optimizer.lr) == (5, True, 3e-5)
    assert config.data.sources[0].format.roles == {"a": "user"}


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
        ("--loss-mask-turns first", "--loss-mask-turns must be one of all, last, flags"),
        ("--history forgotten", "--history must be one of as_served"),
        ("--special-text keep", "--special-text must be one of allow, escape, reject"),
        ("--too-long shorten", "--too-long must be one of drop, truncate_end, error"),
        ("--max-bad-rows-in-a-row 0", "--max-bad-rows-in-a-row must be positive"),
        ("--row-shape xml", "--row-shape must be one of auto, messages, alpaca, prompt_completion, text"),
        ("--row-shape text --input-key chat", "--column-names: 'messages' is no field of --row-shape text: text"),
        ("--column-names {", "--column-names: not JSON: {"),
        ("--column-names [1]", "--column-names: a JSON object was expected"),
        ('--column-names {"prompt":1}', "'prompt' must be the name of a column, not 1"),
        ('--column-names {"messages":"a"} --input-key b', "--input-key b: --column-names says messages is 'a'"),
        ('--column-names {"tools":"a"} --tool-key b', "--tool-key b: --column-names says tools is 'a'"),
        ('--role-names {"Bot":"robot"}', "--role-names: 'Bot' must be one of system, user, assistant, tool"),
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
