"""Launch flags, by Miles's names -> a `TrainConfig`.

A flag that means something here is taken; one that only says "this is SFT" is accepted with its one value;
the model's sizes, which Miles's launch scripts carry, are compared with config.json; what means nothing here
is refused by name. Nothing is ignored in silence.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import NoReturn

import yaml

from miles import storage
from miles.architecture import ModelShape
from miles.data.config import (
    ROLE_NAMES,
    ROW_FIELDS,
    DataConfig,
    EncodeConfig,
    OrderConfig,
    PackConfig,
    RowFormat,
    SourceConfig,
    StreamConfig,
    named_columns,
)
from miles.errors import ConfigError
from miles.flags import chat_template, json_object
from miles.train.config import ClusterConfig, LoggingConfig, TrainConfig
from miles.train.optimizer import OptimizerSettings

SFT_ONLY = {
    "loss_type": "sft_loss",
    "rollout_function_path": "miles.rollout.sft_rollout.generate_rollout",
}
"""Flags with one possible value."""

ACCEPTED_SWITCHES = (
    "calculate_per_token_loss",
    "disable_compute_advantages_and_returns",
    "debug_train_only",
    "use_dynamic_batch_size",
    "use_distributed_optimizer",
)
"""Switches for what is always so here."""

MODEL_SIZES = {
    "num_layers": int,
    "hidden_size": int,
    "ffn_hidden_size": int,
    "num_attention_heads": int,
    "num_query_groups": int,
    "kv_channels": int,
    "vocab_size": int,
    "rotary_base": int,
    "norm_epsilon": float,
}
"""Flags of Miles's model scripts; they must say what config.json says."""

MODEL_SWITCHES = {
    "swiglu": True,
    "group_query_attention": True,
    "use_rotary_position_embeddings": True,
    "qk_layernorm": True,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
}
"""Switches of Miles's model scripts, compared likewise."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See {self.prog} --help; a flag of an RL run that means nothing in SFT goes out")


def build_parser(prog: str = "miles train") -> argparse.ArgumentParser:
    """The parser of `miles train`; defaults are those of the dataclasses that the values go into."""
    parser = _Parser(prog=prog, allow_abbrev=False, description="Fine-tune; flags have Miles's names.")
    parser.add_argument("--config", metavar="YAML", help="flags from a YAML mapping (names with _ or -)")

    data = parser.add_argument_group("data")
    data.add_argument("--prompt-data", nargs="+", metavar="PATH", help="one path, or NAME PATH pairs")
    data.add_argument(
        "--prompt-data-weights",
        nargs="+",
        type=float,
        default=[],
        metavar="WEIGHT",
        help="one a source, on any scale: its share of every step (default: all rows once an epoch)",
    )
    data.add_argument("--input-key", help="column of the conversation (default: found)")
    data.add_argument("--tool-key", help="column of the tools (default: tools)")
    data.add_argument(
        "--row-shape",
        default=RowFormat.shape,
        help=f"{', '.join(ROW_FIELDS)}; auto: found from the first rows of each source (default: %(default)s)",
    )
    data.add_argument(
        "--column-names",
        type=json_object,
        default={},
        metavar="JSON",
        help='field of the row shape -> column, such as {"prompt": "question"}; others: usual names',
    )
    data.add_argument(
        "--role-names",
        type=json_object,
        default={},
        metavar="JSON",
        help=f"role in the rows -> {', '.join(ROLE_NAMES)}; beside the known ones",
    )
    data.add_argument("--rollout-shuffle", action="store_true", help="shuffle by seed and epoch; else file order")
    data.add_argument("--rollout-seed", type=int, default=OrderConfig.seed)
    data.add_argument("--shuffle-window", type=int, default=OrderConfig.window_rows, metavar="ROWS")
    data.add_argument("--drop-last", action="store_true", help="leave out the short step at an epoch's end")
    data.add_argument("--num-epoch", type=int, default=OrderConfig.num_epoch)
    data.add_argument("--num-rollout", type=int, help="a limit in steps")
    data.add_argument("--rollout-batch-size", type=int, help="rows of a step")
    data.add_argument("--global-batch-size", type=int, help="the same number as --rollout-batch-size")
    data.add_argument("--n-samples-per-prompt", type=int, default=1, help="1: an SFT row is one sample")
    data.add_argument("--max-tokens-per-gpu", type=int, default=PackConfig.max_tokens_per_gpu)
    data.add_argument("--max-sample-tokens", type=int, help="see --too-long (default: what fits a GPU)")
    data.add_argument("--chat-template-path", help="a Jinja file in place of the tokenizer's own template")
    data.add_argument("--apply-chat-template-kwargs", type=json_object, default={}, metavar="JSON")
    data.add_argument("--apply-chat-template", action="store_true", help="always so")
    data.add_argument("--loss-mask-type", default="auto", help="auto: learned from the template and certified")
    data.add_argument(
        "--loss-mask-turns",
        default=EncodeConfig.turns,
        help="assistant turns that are trained: all, last, or flags: only those that a row flags "
        "(default: %(default)s); a turn that a row flags 0 never is",
    )
    data.add_argument(
        "--empty-think",
        default=EncodeConfig.empty_think,
        help="an empty think block that the template puts before an answer: mask or train (default: %(default)s)",
    )
    data.add_argument(
        "--history",
        default=EncodeConfig.history,
        help="earlier turns that a template changes: as_served, as it renders them (default: %(default)s)",
    )
    data.add_argument(
        "--special-text",
        default=EncodeConfig.special_text,
        help="content that spells a control token: allow, it becomes that token; escape, ordinary text; reject "
        "(default: %(default)s)",
    )
    data.add_argument(
        "--too-long",
        default=EncodeConfig.too_long,
        help="a row over --max-sample-tokens: drop, truncate_end or error (default: %(default)s)",
    )
    data.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the tokenizer's folder brings with it"
    )
    data.add_argument(
        "--max-bad-fraction",
        type=float,
        default=DataConfig.max_bad_fraction,
        help="a larger share of dropped rows ends the run (default: %(default)s)",
    )
    data.add_argument(
        "--max-bad-rows-in-a-row",
        type=int,
        default=DataConfig.max_bad_rows_in_a_row,
        metavar="ROWS",
        help="so many dropped rows one after the other end the run (default: %(default)s)",
    )
    data.add_argument("--loader-cpus", type=int, default=StreamConfig.loader_cpus)
    data.add_argument("--prefetch-steps", type=int, default=StreamConfig.prefetch_steps)

    files = parser.add_argument_group("checkpoints")
    files.add_argument("--hf-checkpoint", help="folder with config.json and tokenizer")
    files.add_argument("--ref-load", help="torch_dist folder to start from")
    files.add_argument("--load", help="torch_dist folder of a run to go on from (default: --save)")
    files.add_argument("--save", help="where checkpoints go; one that is there is gone on from")
    files.add_argument("--save-interval", type=int, default=TrainConfig.save_interval, metavar="STEPS")
    files.add_argument("--output-dir", default="", help="metrics, config, first batch, rejects (default: --save)")

    layout = parser.add_argument_group("parallelism and cluster")
    layout.add_argument("--tensor-model-parallel-size", type=int, default=ClusterConfig.tensor)
    layout.add_argument("--pipeline-model-parallel-size", type=int, default=ClusterConfig.pipeline)
    layout.add_argument("--context-parallel-size", type=int, default=1, help="1 so far")
    layout.add_argument("--expert-model-parallel-size", type=int, default=1, help="1 so far")
    layout.add_argument("--expert-tensor-parallel-size", type=int, default=1, help="1 so far")
    layout.add_argument("--sequence-parallel", action="store_true")
    layout.add_argument("--actor-num-nodes", type=int, default=ClusterConfig.num_nodes)
    layout.add_argument("--actor-num-gpus-per-node", type=int, default=ClusterConfig.gpus_per_node)
    layout.add_argument("--ray-address", help="a running Ray (default: one of the run's own, on localhost)")
    layout.add_argument("--distributed-timeout-minutes", type=float, default=ClusterConfig.timeout_minutes)
    layout.add_argument("--seed", type=int, default=TrainConfig.seed)
    layout.add_argument("--bf16", action="store_true", help="mixed precision")

    optimizer = parser.add_argument_group("optimizer")
    optimizer.add_argument("--optimizer", default="adam", help="adam")
    optimizer.add_argument("--lr", type=float, default=OptimizerSettings.lr)
    optimizer.add_argument("--min-lr", type=float, default=OptimizerSettings.min_lr)
    optimizer.add_argument("--lr-decay-style", default=OptimizerSettings.lr_decay_style)
    optimizer.add_argument("--lr-warmup-iters", type=int, default=OptimizerSettings.lr_warmup_iters, metavar="STEPS")
    optimizer.add_argument("--weight-decay", type=float, default=OptimizerSettings.weight_decay)
    optimizer.add_argument("--adam-beta1", type=float, default=OptimizerSettings.adam_beta1)
    optimizer.add_argument("--adam-beta2", type=float, default=OptimizerSettings.adam_beta2)
    optimizer.add_argument("--adam-eps", type=float, default=OptimizerSettings.adam_eps)
    optimizer.add_argument("--clip-grad", type=float, default=OptimizerSettings.clip_grad)

    other = parser.add_argument_group("logging, and flags that say that this is SFT")
    other.add_argument("--use-tensorboard", action="store_true")
    for name, value in SFT_ONLY.items():
        other.add_argument(_flag(name), default=value, help=f"{value}")
    for name in ACCEPTED_SWITCHES:
        other.add_argument(_flag(name), action="store_true", help="always so")

    model = parser.add_argument_group("the model's sizes: compared with config.json where given")
    for name, kind in MODEL_SIZES.items():
        model.add_argument(_flag(name), type=kind)
    for name in MODEL_SWITCHES:
        model.add_argument(_flag(name), action="store_true")
    model.add_argument("--normalization", default="RMSNorm")
    return parser


def parse(words: Sequence[str]) -> TrainConfig:
    """Reads a launch line.

    Raises:
        ConfigError: names the flag, what was found, what was expected and what to do.
    """
    parser = build_parser()
    flags = parser.parse_args(list(words))
    if flags.config:
        flags = parser.parse_args([*_words_of_yaml(flags.config), *words])
    for name in ("prompt_data", "hf_checkpoint", "save"):
        if not getattr(flags, name):
            raise ConfigError(f"{_flag(name)} is missing")
    _require_supported(flags)
    batch = flags.rollout_batch_size or flags.global_batch_size or OrderConfig.batch_size
    if flags.global_batch_size and flags.global_batch_size != batch:
        raise ConfigError(
            f"--rollout-batch-size {flags.rollout_batch_size} and --global-batch-size {flags.global_batch_size} must "
            "be equal: one batch read is one optimizer step"
        )
    _require_model(flags)
    cluster = ClusterConfig(
        num_nodes=flags.actor_num_nodes,
        gpus_per_node=flags.actor_num_gpus_per_node,
        tensor=flags.tensor_model_parallel_size,
        pipeline=flags.pipeline_model_parallel_size,
        sequence_parallel=flags.sequence_parallel,
        ray_address=flags.ray_address,
        timeout_minutes=flags.distributed_timeout_minutes,
    )
    layout = cluster.layout
    data = DataConfig(
        sources=_sources(flags.prompt_data, _row_format(flags)),
        order=OrderConfig(
            batch_size=batch,
            seed=flags.rollout_seed,
            shuffle=flags.rollout_shuffle,
            window_rows=flags.shuffle_window,
            drop_last=flags.drop_last,
            num_epoch=flags.num_epoch,
            weights=tuple(flags.prompt_data_weights),
        ),
        encode=EncodeConfig(
            tokenizer=flags.hf_checkpoint,
            chat_template=chat_template(flags.chat_template_path),
            template_kwargs=flags.apply_chat_template_kwargs,
            turns=flags.loss_mask_turns,
            empty_think=flags.empty_think,
            history=flags.history,
            special_text=flags.special_text,
            too_long=flags.too_long,
            max_sample_tokens=flags.max_sample_tokens or flags.max_tokens_per_gpu,
            trust_remote_code=flags.trust_remote_code,
        ),
        pack=PackConfig(dp_size=layout.data, max_tokens_per_gpu=flags.max_tokens_per_gpu),
        stream=StreamConfig(loader_cpus=flags.loader_cpus, prefetch_steps=flags.prefetch_steps),
        max_bad_fraction=flags.max_bad_fraction,
        max_bad_rows_in_a_row=flags.max_bad_rows_in_a_row,
    )
    return TrainConfig(
        hf_checkpoint=flags.hf_checkpoint,
        ref_load=flags.ref_load or flags.load or flags.save,
        save=flags.save,
        data=data,
        load=flags.load,
        save_interval=flags.save_interval,
        output_dir=flags.output_dir,
        num_rollout=flags.num_rollout,
        optimizer=OptimizerSettings(
            lr=flags.lr,
            min_lr=flags.min_lr,
            lr_decay_style=flags.lr_decay_style,
            lr_warmup_iters=flags.lr_warmup_iters,
            weight_decay=flags.weight_decay,
            adam_beta1=flags.adam_beta1,
            adam_beta2=flags.adam_beta2,
            adam_eps=flags.adam_eps,
            clip_grad=flags.clip_grad,
        ),
        cluster=cluster,
        seed=flags.seed,
        bf16=flags.bf16,
        logging=LoggingConfig(use_tensorboard=flags.use_tensorboard),
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _words_of_yaml(path: str) -> list[str]:
    try:
        content = yaml.safe_load(storage.read_text(path))
    except FileNotFoundError as error:
        raise ConfigError(f"--config {path}: no such file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not YAML ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: expected a mapping of flag names to values")
    words: list[str] = []
    for key, value in content.items():
        flag = _flag(str(key))
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            values = value if isinstance(value, list) else [value]
            words += [flag, *(json.dumps(item) if isinstance(item, dict) else str(item) for item in values)]
    return words


def _require_supported(flags: argparse.Namespace) -> None:
    for name, only in SFT_ONLY.items():
        if getattr(flags, name) != only:
            raise ConfigError(f"{_flag(name)} {getattr(flags, name)}: this is SFT only; leave it out or give {only}")
    for name, supported in (
        ("optimizer", "adam"),
        ("normalization", "RMSNorm"),
        ("n_samples_per_prompt", 1),
        ("context_parallel_size", 1),
        ("expert_model_parallel_size", 1),
        ("expert_tensor_parallel_size", 1),
    ):
        if getattr(flags, name) != supported:
            raise ConfigError(f"{_flag(name)} {getattr(flags, name)} is not supported; only {supported} is so far")
    if flags.loss_mask_type not in ("auto", "qwen", "qwen3"):
        raise ConfigError(
            f"--loss-mask-type {flags.loss_mask_type}: the mask is learned from the chat template and certified, "
            "whatever the model; leave the flag out, or give auto (qwen and qwen3 are taken to mean the same)"
        )


def _require_model(flags: argparse.Namespace) -> None:
    """The sizes on the launch line against config.json."""
    given = {name: getattr(flags, name) for name in MODEL_SIZES if getattr(flags, name) is not None}
    given.update({name: True for name in MODEL_SWITCHES if getattr(flags, name)})
    if not given:
        return
    wanted = ModelShape.from_hf_folder(flags.hf_checkpoint).megatron_args()
    wanted["disable_bias_linear"] = not wanted["add_bias_linear"]
    wrong = [
        f"{_flag(name)} {value}: config.json says {wanted[name]}"
        for name, value in given.items()
        if wanted[name] != value
    ]
    if wrong:
        raise ConfigError(
            f"the model's sizes are those of {flags.hf_checkpoint}; the launch line says otherwise:\n  "
            + "\n  ".join(wrong)
        )


def _row_format(flags: argparse.Namespace) -> RowFormat:
    columns = named_columns(flags.column_names, flags.input_key, flags.tool_key)
    return RowFormat(flags.row_shape, columns, flags.role_names)


def _sources(words: Sequence[str], format: RowFormat) -> tuple[SourceConfig, ...]:
    """One path, or name path pairs."""
    if len(words) == 1:
        name = words[0].rstrip("/").rsplit("/", 1)[-1].split(".")[0] or "data"
        return (SourceConfig(name, (words[0],), format),)
    if len(words) % 2:
        raise ConfigError(f"--prompt-data takes one path, or NAME PATH pairs; found {len(words)} words")
    return tuple(SourceConfig(name, (path,), format) for name, path in zip(words[::2], words[1::2], strict=True))
