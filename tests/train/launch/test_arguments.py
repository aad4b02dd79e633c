"""Launch lines -> the settings of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from miles.architecture.families import read_shape
from miles.common.flags import Setting, flag_of, settings_of
from miles.data.config import DataConfig, EncodeConfig, RowFormat
from miles.errors import ConfigError
from miles.train.compute_config import ComputeConfig
from miles.train.launch.arguments import parse
from miles.train.launch.fixed_flags import ALWAYS, ONE_VALUE, REPLACED
from miles.train.launch.model_flags import EXPERT_LAYERS, SIZES, SWITCHES
from miles.train.launch.parser import launch_settings
from tests.support.fault_table import NOTHING, observed
from tests.support.launch import QWEN3_MOE, words_of, write_model

SFT_LINE = """
    --rollout-function-path miles.rollout.sft_rollout.generate_rollout --loss-type sft_loss
    --calculate-per-token-loss --disable-compute-advantages-and-returns --debug-train-only
    --rollout-shuffle --rollout-seed 7 --num-epoch 3 --rollout-batch-size 128
    --global-batch-size 128 --use-dynamic-batch-size --max-tokens-per-gpu 9216
    --actor-num-gpus-per-node 8 --tensor-model-parallel-size 2 --lr 1e-5 --lr-decay-style cosine
    --lr-warmup-iters 100 --swiglu --num-layers 36 --hidden-size 2560 --group-query-attention
    --num-query-groups 8 --attention-dropout 0 --hidden-dropout 0.0 --attention-backend flash
    --accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32 --rotary-percent 1.0
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --sequence-parallel --num-gpus-per-node 8 --expert-tensor-parallel-size 1 --kv-channels 128
    --qk-layernorm --normalization RMSNorm --rotary-base 1000000
"""


def test_an_sft_line_of_miles_runs(base: list[str]) -> None:
    config = parse([*base, *SFT_LINE.split()])
    order = config.data.order
    assert (order.batch_size, order.seed, order.shuffle) == (128, 7, True)
    assert config.data.pack.dp_size == 4
    assert config.data.encode.max_sample_tokens == config.data.pack.max_tokens_per_gpu == 9216
    assert (config.optimizer.lr, config.optimizer.lr_warmup_iters) == (1e-5, 100)
    assert config.run_dir == str(Path("run").absolute())


def test_a_mixture_is_name_path_pairs(base: list[str]) -> None:
    config = parse([*base, "--prompt-data", "hermes", "a.parquet", "orca", "b.parquet"])
    assert [(source.name, source.paths) for source in config.data.sources] == [
        ("hermes", (str(Path("a.parquet").absolute()),)),
        ("orca", (str(Path("b.parquet").absolute()),)),
    ]


def test_a_split_is_one_for_all_or_one_a_source(base: list[str]) -> None:
    line = [*base, "--prompt-data", "a", "a", "b", "b", "--eval-prompt-data", "a"]
    for words, splits in (([], [None] * 2), (["train_sft"], ["train_sft"] * 2), (["x", "all"], 0)):
        config = parse([*line, *(["--split", *words] if words else [])])
        assert [source.split for source in config.data.sources] == (splits or ["x", "all"])
        # Rows to evaluate are of the split that is named for it.
        assert [source.split for source in config.evaluation.sources] == [None]


def test_local_paths_are_absolute_from_the_line_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaders and ranks have working directories of their own. A source keeps its name."""
    (tmp_path / "hf").mkdir()
    write_model(tmp_path / "hf")
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    line = """--hf-checkpoint hf --prompt-data ./x/rows.v2.jsonl --ref-load ./weights --save=~/run
        --load file:///old/run/ --output-dir ../logs --save-hf hf/{rollout_id}
        --chat-template-path t.jinja --eval-prompt-data held s3://b/h.jsonl chat eval/*.jsonl
        --use-wandb --wandb-dir wandb"""
    config = parse(line.split())

    here = str(tmp_path)
    assert config.hf_checkpoint == config.data.encode.tokenizer == f"{here}/hf"
    assert (config.ref_load, config.save, config.load) == (
        f"{here}/weights",
        "/home/me/run",
        "/old/run",
    )
    assert config.output_dir == f"{here}/../logs"
    assert config.save_hf == f"{here}/hf/{{rollout_id}}"
    assert config.data.encode.chat_template == "{{ messages }}"
    assert config.logging.wandb_dir == f"{here}/wandb"
    (source,) = config.data.sources
    assert (source.name, source.paths) == ("rows", (f"{here}/x/rows.v2.jsonl",))
    assert [source.paths for source in config.evaluation.sources] == [
        ("s3://b/h.jsonl",),
        (f"{here}/eval/*.jsonl",),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--load", ""], "--load is empty, such as a variable that is not set"),
        (["--ref-load", ""], "--ref-load is empty"),
        (["--save", "s3:/bucket/run"], "--save s3:/bucket/run: a URL has two slashes"),
        (["--save", "run\n--lr"], r"--save 'run\\n--lr': a path with a line break"),
        (["--save", "run\udcff"], r"--save 'run\\udcff': the name is not UTF-8"),
    ],
)
def test_a_word_that_is_no_path(base: list[str], words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        parse([*base, *words])
    fault = {"--load": "empty path, of a variable that is not set", "--save": "URL with one slash"}
    if words[1] in ("", "s3:/bucket/run") and words[0] in fault:
        observed(fault[words[0]], str(refused.value), words[0], NOTHING)


def test_the_format_of_rows(base: list[str]) -> None:
    assert [source.format for source in parse(base).data.sources] == [RowFormat()]

    line = "--prompt-data a a.parquet b b.parquet --input-key chat --tool-key fs"
    config = parse([*base, *line.split()])
    assert [source.format for source in config.data.sources] == 2 * [
        RowFormat("auto", {"messages": "chat", "tools": "fs"})
    ]

    line = "--row-shape prompt_completion --tool-key fs"
    names = ["--column-names", '{"prompt": "q"}', "--role-names", '{"Bot": "assistant"}']
    config = parse([*base, *line.split(), *names])
    assert config.data.sources[0].format == RowFormat(
        "prompt_completion", {"prompt": "q", "tools": "fs"}, {"Bot": "assistant"}
    )


def test_the_policies_of_the_data(base: list[str]) -> None:
    config = parse(base)
    assert config.data.encode == EncodeConfig(
        base[1], max_sample_tokens=config.data.pack.max_tokens_per_gpu
    )
    assert config.data.max_bad_rows_in_a_row == DataConfig.max_bad_rows_in_a_row

    line = """--loss-mask-turns flags --empty-think train --history as_served --special-text escape
        --too-long truncate_end --trust-remote-code --max-bad-rows-in-a-row 7 --max-sample-tokens 99
    """
    config = parse([*base, *line.split()])
    encode = config.data.encode
    assert (encode.turns, encode.empty_think, encode.history) == ("flags", "train", "as_served")
    assert (encode.special_text, encode.too_long) == ("escape", "truncate_end")
    assert encode.trust_remote_code
    assert (config.data.max_bad_rows_in_a_row, encode.max_sample_tokens) == (7, 99)


def test_reading_a_line_loads_no_torch() -> None:
    code = (
        "import sys, miles.cli.commands, miles.train.launch.arguments, miles.train.launch.flags_table\n"
        "miles.cli.commands.build_parser()\n"
        "heavy = {'torch', 'megatron', 'ray', 'transformers', 'numpy', 'fsspec', 'rich'}\n"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("word", "value"),
    [
        (".1", 0.1),
        ("1.", 1.0),
        ("+4", 4.0),
        ("007", 7.0),
        ("1_000", 1000.0),
        (" 2 ", 2.0),
        ("1e-5\r", 1e-5),
    ],
)
def test_a_word_is_what_python_takes_for_a_number(base: list[str], word: str, value: float) -> None:
    assert parse([*base, "--weight-decay", word]).optimizer.weight_decay == value
    if value.is_integer() and "." not in word:
        assert parse([*base, "--seed", word]).seed == value


def test_only_the_last_value_is_judged(base: list[str]) -> None:
    line = "--num-epoch 0 --too-long cut --loss-type policy_loss"
    change = "--num-epoch 2 --too-long error --loss-type sft_loss"
    config = parse([*base, *line.split(), *change.split()])
    assert (config.data.order.num_epoch, config.data.encode.too_long) == (2, "error")


def test_an_empty_word_is_an_empty_mapping(base: list[str]) -> None:
    names = ["--column-names", "", "--role-names", "", "--apply-chat-template-kwargs", ""]
    assert parse([*base, *names]) == parse(base)


VALUES: dict[str, Any] = {
    "tokenizer_engine": "tiktoken",
    "lora_dropout": 0.5,
    "target_modules": ["q_proj,k_proj", "linear_proj"],
    "exclude_modules": ["o_proj"],
    "prompt_data": ["a", "a.parquet", "b", "b.parquet"],
    "prompt_data_weights": [1.0, 3.0],
    "row_shape": "messages",
    "column_names": {"messages": "chat"},
    "role_names": {"Bot": "assistant"},
    "transform": "string:capwords",
    "apply_chat_template_kwargs": {"enable_thinking": False},
    "loss_mask_turns": "last",
    "empty_think": "train",
    "empty_answer": "train",
    "history": "as_served",
    "special_text": "escape",
    "too_long": "error",
    "max_bad_fraction": 0.5,
    "eval_fraction": 0.25,
    "eval_prompt_data": ["held.parquet"],
    "recompute_granularity": "full",
    "recompute_method": "block",
    "lr": 0.5,
    "min_lr": 1e-7,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "lr_decay_style": "linear",
    "lr_warmup_fraction": 0.5,
    "wandb_mode": "offline",
    "on_save_error": "continue",
    "max_sample_tokens": 100,
    "train_env_vars": {"NCCL_DEBUG": "WARN"},
    "main_params_dtype": "fp16",
    "exp_avg_dtype": "bf16",
    "exp_avg_sq_dtype": "fp16",
    "optimizer_offload_fraction": 0.5,
    "expert_tensor_parallel_size": 1,  # without the flag it is the tensor size
    "attention_backend": "local",
    "transformer_impl": "local",
    **{one.name: one.values[-1] for one in ONE_VALUE},
    EXPERT_LAYERS: "[1]*4",
}
"""A value for each flag that does not take just any number or word."""

OFFLOADING = {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True}

WITH_LORA = {"lora_rank": 8}

TOGETHER: dict[str, dict[str, Any]] = {
    "lora_alpha": WITH_LORA,
    "lora_dropout": WITH_LORA,
    "target_modules": WITH_LORA,
    "exclude_modules": {**WITH_LORA, "target_modules": ["all-linear"]},
    "lora_adapter_path": WITH_LORA,
    "use_rslora": WITH_LORA,
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
    "optimizer_cpu_offload": {"use_precision_aware_optimizer": True},
    "overlap_cpu_optimizer_d2h_h2d": OFFLOADING,
    "overlap_param_gather": {"overlap_grad_reduce": True},
    "optimizer_offload_fraction": OFFLOADING,
    "main_params_dtype": {"use_precision_aware_optimizer": True},
    "exp_avg_dtype": {"use_precision_aware_optimizer": True},
    "exp_avg_sq_dtype": {"use_precision_aware_optimizer": True},
}
"""Flags that another flag must not be without."""

ON_ALREADY = tuple(
    setting.flag.key_in_yaml
    for setting in settings_of(ComputeConfig)
    if setting.default is True and not setting.flag.negates
)
"""Switches of the ways to compute that are on without a word: only `false` changes something."""

CHANGES_NOTHING = {
    "history",  # has one value so far
    *ON_ALREADY,
    *(one.name for one in ONE_VALUE),
    *ALWAYS,
    *(one.name for one in REPLACED),
    *SIZES,  # are compared
    *SWITCHES,
    EXPERT_LAYERS,
}


def value_of(setting: Setting) -> Any:
    name = setting.flag.key_in_yaml
    if name in VALUES:
        return VALUES[name]
    if setting.is_switch:
        return True
    return 2 if setting.item_type in (int, float) else "word"


@pytest.mark.parametrize("flag", launch_settings())
def test_every_flag_arrives_from_line_and_yaml(base: list[str], tmp_path: Path, flag: str) -> None:
    setting = launch_settings()[flag]
    name = setting.flag.key_in_yaml
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts/config.json").write_text(json.dumps(QWEN3_MOE))
    (tmp_path / "template").write_text("{{ messages }}")

    has_experts = "expert" in name or name.startswith("moe_")
    checkpoint = str(tmp_path / "experts") if has_experts else base[1]
    others = {"hf_checkpoint": checkpoint, "prompt_data": "rows.parquet", "save": "run"}
    others |= TOGETHER.get(name, {})
    if name in (*SIZES, *SWITCHES):
        value = size_of(name, checkpoint)
    else:
        files = {"chat_template_path": "template", "hf_checkpoint": "experts"}
        value = str(tmp_path / files[name]) if name in files else value_of(setting)

    if value in (None, False):  # a switch of another model
        with pytest.raises(ConfigError, match=f"{flag} True: config.json says False"):
            parse(words_of({**others, name: True}))
        return

    content = {**others, name: value}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    on_the_line = parse(words_of(content))
    assert on_the_line == parse(["--config", str(tmp_path / "run.yaml")])
    if not name.startswith("recompute"):  # which go together only
        assert (on_the_line != parse(words_of(others))) == (name not in CHANGES_NOTHING)


@pytest.mark.parametrize("name", ON_ALREADY)
def test_a_switch_is_turned_off_by_its_opposite_or_by_false(
    base: list[str], tmp_path: Path, name: str
) -> None:
    (tmp_path / "run.yaml").write_text(f"{name}: false\n")
    off = parse([*base, "--config", str(tmp_path / "run.yaml")])
    opposite = {setting.field: flag for flag, setting in launch_settings().items()}
    field = launch_settings()[flag_of(name)].field
    assert opposite[field].startswith("--no-")
    assert off == parse([*base, opposite[field]]) != parse(base)
    assert getattr(off.compute, field) is False


def size_of(name: str, checkpoint: str) -> Any:
    args = read_shape(checkpoint).megatron_args()
    return True if name == "disable_bias_linear" else args.get(name)


def test_a_flag_is_written_with_dashes() -> None:
    assert flag_of("max_tokens_per_gpu") == "--max-tokens-per-gpu"
    for name in launch_settings():
        assert name == name.lower()
        assert "_" not in name
