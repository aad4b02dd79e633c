"""Launch lines -> configuration, and mistakes in them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from miles.architecture.families import read_shape
from miles.data.config import DataConfig, EncodeConfig, RowFormat
from miles.errors import ConfigError
from miles.train.launch.arguments import parse
from miles.train.launch.flags_table import table
from miles.train.launch.launch_line import ALWAYS, ONE_VALUE, REFUSALS, SIZES, SWITCHES, flag_of
from miles.train.launch.parser import build_parser

EXPERTS = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}

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
            *[
                "--rollout-function-path",
                "miles.rollout.sft_rollout.generate_rollout",
                "--loss-type",
                "sft_loss",
            ],
            *[
                "--calculate-per-token-loss",
                "--disable-compute-advantages-and-returns",
                "--debug-train-only",
            ],
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
            *[
                "--use-dynamic-batch-size",
                "--max-tokens-per-gpu",
                "9216",
                "--actor-num-gpus-per-node",
                "8",
            ],
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
            *[
                "--attention-dropout",
                "0",
                "--hidden-dropout",
                "0.0",
                "--attention-backend",
                "flash",
            ],
            *[
                "--accumulate-allreduce-grads-in-fp32",
                "--attention-softmax-in-fp32",
                "--rotary-percent",
                "1.0",
            ],
            *[
                "--recompute-granularity",
                "full",
                "--recompute-method",
                "uniform",
                "--recompute-num-layers",
                "1",
            ],
            *[
                "--sequence-parallel",
                "--num-gpus-per-node",
                "8",
                "--expert-tensor-parallel-size",
                "1",
            ],
            *[
                "--kv-channels",
                "128",
                "--qk-layernorm",
                "--normalization",
                "RMSNorm",
                "--rotary-base",
                "1000000",
            ],
        ]
    )
    assert (config.data.order.batch_size, config.data.order.seed, config.data.order.shuffle) == (
        128,
        7,
        True,
    )
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
        [
            *base,
            "--prompt-data",
            "a",
            "a.parquet",
            "b",
            "b.parquet",
            "--input-key",
            "chat",
            "--tool-key",
            "fs",
        ]
    )
    assert [source.format for source in config.data.sources] == 2 * [
        RowFormat("auto", {"messages": "chat", "tools": "fs"})
    ]
    config = parse(
        [
            *base,
            *[
                "--row-shape",
                "prompt_completion",
                "--column-names",
                '{"prompt": "q"}',
                "--tool-key",
                "fs",
            ],
            *["--role-names", '{"Bot": "assistant"}'],
        ]
    )
    assert config.data.sources[0].format == RowFormat(
        "prompt_completion", {"prompt": "q", "tools": "fs"}, {"Bot": "assistant"}
    )


def test_policies_of_the_data(base: list[str]) -> None:
    config = parse(base)
    assert config.data.encode == EncodeConfig(
        base[1], max_sample_tokens=config.data.pack.max_tokens_per_gpu
    )
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
    assert (encode.special_text, encode.too_long, encode.trust_remote_code) == (
        "escape",
        "truncate_end",
        True,
    )
    assert (config.data.max_bad_rows_in_a_row, encode.max_sample_tokens) == (7, 99)


def test_each_flag_has_a_help_text() -> None:
    for action in build_parser()._actions:
        assert action.help, action.option_strings
        assert action.metavar or action.nargs == 0, (
            f"{action.option_strings}: the help would show its name again"
        )
    build_parser().format_help()  # raises where a help text is not to be formatted


def test_the_table_in_the_docs_is_made_from_the_code() -> None:
    path = Path(__file__).parents[3] / "docs/flags.md"
    assert path.read_text() == table(), "python -m miles.train.launch.flags_table > docs/flags.md"
    for refusal in REFUSALS:
        for name in refusal.names.split():
            assert (
                flag_of(name.rstrip("*") + ("x" if name.endswith("*") else "")) not in known_flags()
            ), name


def known_flags() -> list[str]:
    return [option for action in build_parser()._actions for option in action.option_strings]


VALUES: dict[str, Any] = {
    "prompt_data": ["a", "a.parquet", "b", "b.parquet"],
    "prompt_data_weights": [1.0, 3.0],
    "row_shape": "messages",
    "column_names": {"messages": "chat"},
    "role_names": {"Bot": "assistant"},
    "apply_chat_template_kwargs": {"enable_thinking": False},
    "loss_mask_turns": "last",
    "empty_think": "train",
    "history": "as_served",
    "special_text": "escape",
    "too_long": "error",
    "loss_mask_type": "qwen",
    "max_bad_fraction": 0.5,
    "eval_fraction": 0.25,
    "eval_prompt_data": ["held.parquet"],
    "recompute_granularity": "full",
    "recompute_method": "block",
    "lr": 0.5,
    "min_lr": 1e-7,
    "lr_decay_style": "linear",
    "lr_warmup_fraction": 0.5,
    "wandb_mode": "offline",
    "on_save_error": "continue",
    "max_sample_tokens": 100,
}
"""A value for each flag that takes not just any number or word."""

TOGETHER: dict[str, dict[str, Any]] = {
    "prompt_data_weights": {"prompt_data": VALUES["prompt_data"]},
    "eval_interval": {"eval_fraction": 0.1},
    "eval_samples": {"eval_fraction": 0.1},
    "keep_best": {"eval_fraction": 0.1},
    "recompute_granularity": {"recompute_method": "uniform", "recompute_num_layers": 2},
    "recompute_method": {"recompute_granularity": "full", "recompute_num_layers": 2},
    "recompute_num_layers": {"recompute_granularity": "full", "recompute_method": "uniform"},
    "tensor_model_parallel_size": {"actor_num_gpus_per_node": 2},
    "pipeline_model_parallel_size": {"actor_num_gpus_per_node": 2},
    "expert_tensor_parallel_size": {
        "actor_num_gpus_per_node": 4,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_model_parallel_size": 2,
    },
    "sequence_parallel": {"actor_num_gpus_per_node": 2, "tensor_model_parallel_size": 2},
    "expert_model_parallel_size": {"actor_num_gpus_per_node": 2},
}
"""What a flag must not be without."""

CHANGES_NOTHING = {
    "config",  # says where the others are
    "history",  # has one value so far
    "loss_mask_type",  # each of its values means the same
    *ONE_VALUE,
    *ALWAYS,
    *SIZES,  # are compared
    *SWITCHES,
}


def value_of(action: argparse.Action) -> Any:
    name = action.dest
    if name in VALUES:
        return VALUES[name]
    if name in ONE_VALUE:
        return ONE_VALUE[name][0]
    if name == "expert_tensor_parallel_size":
        return 1  # the tensor size is what it is without the flag
    if action.nargs == 0:
        return True
    if action.type in (int, float):
        return 2
    return "word"


@pytest.mark.parametrize(
    "name", [action.dest for action in build_parser()._actions if action.dest != "help"]
)
def test_every_flag_arrives_from_the_line_and_from_yaml(
    base: list[str], tmp_path: Path, name: str
) -> None:
    (action,) = [action for action in build_parser()._actions if action.dest == name]
    files = {name: str(tmp_path / name) for name in ("experts", "template", "yaml")}
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts/config.json").write_text(json.dumps(EXPERTS))
    (tmp_path / "template").write_text("{{ messages }}")
    (tmp_path / "yaml").write_text("seed: 1234\n")
    of_experts = "expert" in name or name.startswith("moe_")
    others = {
        "hf_checkpoint": files["experts"] if of_experts else base[1],
        "prompt_data": "rows.parquet",
    }
    others |= {"save": "run", **TOGETHER.get(name, {})}
    value = {
        "chat_template_path": files["template"],
        "config": files["yaml"],
        "hf_checkpoint": files["experts"],
        **{size: _size(size, str(others["hf_checkpoint"])) for size in (*SIZES, *SWITCHES)},
    }.get(name, value_of(action))
    if value in (None, False):  # a switch of another model
        with pytest.raises(ConfigError, match=f"{flag_of(name)} True: config.json says False"):
            parse(words_of({**others, name: True}))
        return
    content = {**others, name: value}
    on_the_line = parse(words_of(content))
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({key: item for key, item in content.items() if key != "config"})
    )
    assert on_the_line == parse(["--config", str(tmp_path / "run.yaml")])
    if not name.startswith("recompute"):  # which go together only
        assert (on_the_line != parse(words_of(others))) == (name not in CHANGES_NOTHING)


def _size(name: str, checkpoint: str) -> Any:
    args = read_shape(checkpoint).megatron_args()
    return True if name == "disable_bias_linear" else args.get(name)


def words_of(content: dict[str, Any]) -> list[str]:
    words = []
    for name, value in content.items():
        if value is not True:
            values = value if isinstance(value, list) else [value]
            values = [json.dumps(item) if isinstance(item, dict) else str(item) for item in values]
        words += [flag_of(name), *([] if value is True else values)]
    return words


def test_a_mistake_in_yaml_names_the_file(base: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for text, message in (
        (
            "num_epochs: 2",
            r"--config .*run\.yaml: there is no flag --num-epochs; did you mean --num-epoch\?",
        ),
        (
            "kl-coef: 0.1",
            r"--config .*run\.yaml: --kl-coef belongs to the loss of reinforcement learning",
        ),
        ("[1, 2]", "expected a mapping of flag names to values"),
        ("a: [", "not YAML"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            parse(["--config", str(path), *base])
    path.write_bytes(b"lr: \xff\xfe")
    with pytest.raises(ConfigError, match=r"--config .*run\.yaml"):
        parse(["--config", str(path), *base])
    with pytest.raises(ConfigError, match="--config "):
        parse(["--config", str(tmp_path), *base])


def test_yaml_gives_flags_and_the_line_has_the_last_word(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "num_epoch: 2\nrollout-shuffle: true\nlr: 3.0e-5\nrole-names: {a: user}\n"
    )
    config = parse(["--config", str(tmp_path / "run.yaml"), *base, "--num-epoch", "5"])
    assert (config.data.order.num_epoch, config.data.order.shuffle, config.optimizer.lr) == (
        5,
        True,
        3e-5,
    )
    assert config.data.sources[0].format.roles == {"a": "user"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--loss-type policy_loss", "--loss-type policy_loss: this is SFT only"),
        ("--rollout-batch-size 8 --global-batch-size 16", "must be equal"),
        (
            "--rollout-function-path other.generate",
            "--rollout-function-path other.generate: this is SFT only",
        ),
        (
            "--n-samples-per-prompt 8",
            "--n-samples-per-prompt 8: this is SFT only; leave it out or give 1",
        ),
        (
            "--advantage-estimator grpo",
            "--advantage-estimator belongs to the loss of reinforcement learning; leave it",
        ),
        ("--kl-loss-coef=0.1", "--kl-loss-coef belongs to the loss of reinforcement learning"),
        (
            "--rm-type deepscaler",
            "--rm-type belongs to rewards; leave it out: rows carry their own answers",
        ),
        (
            "--sglang-mem-fraction-static 0.7",
            "--sglang-mem-fraction-static belongs to the engines that generate",
        ),
        ("--colocate", "--colocate belongs to the engines that generate rollouts"),
        ("--n-samples-per-eval-prompt 4", "evaluation here is the loss on --eval-prompt-data"),
        (
            "--train-iters 100",
            "--train-iters is the length of a run by other names; give --num-epoch, or --num-roll",
        ),
        ("--micro-batch-size 1", "packed into micro-batches of --max-tokens-per-gpu"),
        ("--lora-rank 16", "--lora-rank is not supported yet; leave it out"),
        (
            "--max-token-per-gpu 100",
            "there is no flag --max-token-per-gpu; did you mean --max-tokens-per-gpu?",
        ),
        ("--frobnicate", "there is no flag --frobnicate; miles train --help"),
        (
            "--attention-dropout 0.1",
            "--attention-dropout 0.1 is not supported; leave it out or give 0.0",
        ),
        ("--optimizer sgd", "--optimizer sgd is not supported; leave it out or give adam"),
        ("--num-experts 8", "--num-experts 8: config.json says None"),
        ("--add-qkv-bias", "--add-qkv-bias True: config.json says False"),
        ("--eval-prompt-data a.jsonl --eval-fraction 0.1", "give one of them"),
        ("--eval-prompt-data a b c", "--eval-prompt-data takes one path, or NAME PATH pairs"),
        ("--eval-interval 5", "--eval-interval needs rows to evaluate on"),
        ("--eval-samples 5", "--eval-samples needs rows to evaluate on"),
        ("--keep-best 1", "--keep-best needs rows to evaluate on"),
        ("--keep-last 0", "--keep-last must be positive, not 0"),
        ("--eval-fraction 1.5", r"--eval-fraction must be in \[0, 1\), not 1.5"),
        ("--eval-fraction 0.1 --eval-samples -1", "--eval-samples must not be negative"),
        ("--wandb-mode sometimes", "--wandb-mode must be online, offline or disabled"),
        ("--recompute-granularity full", "--recompute-granularity full needs --recompute-method"),
        ("--lr-warmup-iters 5 --lr-warmup-fraction 0.1", "say the same; give one of them"),
        (
            "--actor-num-gpus-per-node 8 --num-gpus-per-node 4",
            "is more than a machine has: --num-gpus-per-node 4",
        ),
        (
            "--actor-num-gpus-per-node 5 --pipeline-model-parallel-size 5",
            r"layers \(36\) cannot be divided by",
        ),
        (
            "--expert-model-parallel-size 2 --actor-num-gpus-per-node 2",
            "qwen3 has no experts to spread",
        ),
        ("--lr-decay-style wavy", "--lr-decay-style must be one of"),
        ("--max-sample-tokens 9000 --max-tokens-per-gpu 8000", "--max-sample-tokens 9000 exceeds"),
        ("--num-layers 28", "--num-layers 28: config.json says 36"),
        (
            "--context-parallel-size 2",
            "--context-parallel-size 2: context parallelism is not supported yet; leave it out",
        ),
        (
            "--sequence-parallel",
            "--sequence-parallel spreads tokens over tensor-parallel ranks: give --tensor",
        ),
        (
            "--actor-num-gpus-per-node 3 --tensor-model-parallel-size 2",
            "3 ranks .* cannot be divided",
        ),
        ("--empty-think maybe", "--empty-think must be one of mask, train"),
        ("--loss-mask-turns first", "--loss-mask-turns must be one of all, last, flags"),
        ("--history forgotten", "--history must be one of as_served"),
        ("--special-text keep", "--special-text must be one of allow, escape, reject"),
        ("--too-long shorten", "--too-long must be one of drop, truncate_end, error"),
        ("--max-bad-rows-in-a-row 0", "--max-bad-rows-in-a-row must be positive"),
        (
            "--row-shape xml",
            "--row-shape must be one of auto, messages, alpaca, prompt_completion, text",
        ),
        (
            "--row-shape text --input-key chat",
            "--column-names: 'messages' is no field of --row-shape text: text",
        ),
        ("--column-names {", "--column-names: not JSON: {"),
        ("--column-names [1]", "--column-names: a JSON object was expected"),
        ('--column-names {"prompt":1}', "'prompt' must be the name of a column, not 1"),
        (
            '--column-names {"messages":"a"} --input-key b',
            "--input-key b: --column-names says messages is 'a'",
        ),
        (
            '--column-names {"tools":"a"} --tool-key b',
            "--tool-key b: --column-names says tools is 'a'",
        ),
        (
            '--role-names {"Bot":"robot"}',
            "--role-names: 'Bot' must be one of system, user, assistant, tool",
        ),
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
