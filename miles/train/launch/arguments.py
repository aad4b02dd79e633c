"""Launch flags, by Miles's names -> a `TrainConfig`.

Defaults are those of the records that the values go into. What a launch line carries beside these settings,
`launch_line` takes or refuses; docs/flags.md lists all of it, made from here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import yaml

from miles.architecture.families import read_shape
from miles.common import storage
from miles.data.config import (
    DataConfig,
    EncodeConfig,
    OrderConfig,
    PackConfig,
    RowFormat,
    SourceConfig,
    StreamConfig,
    named_columns,
)
from miles.errors import ConfigError, SourceError
from miles.train.config import (
    ClusterConfig,
    EvalConfig,
    LoggingConfig,
    OptimizerSettings,
    RecomputeConfig,
    TrainConfig,
)
from miles.train.launch.launch_line import (
    ONE_VALUE,
    SIZES,
    SWITCHES,
    flag_of,
    require_known,
    require_one_value,
)
from miles.train.launch.parser import build_parser
from miles.train.launch.values import chat_template
from miles.train.parallel_layout import Layout


def parse(words: Sequence[str]) -> TrainConfig:
    """Reads a launch line.

    Raises:
        ConfigError: names the flag, what was found, what was expected and what to do.
    """
    parser = build_parser()
    known = [option for action in parser._actions for option in action.option_strings]
    require_known(_flags_in(words), known)
    flags = parser.parse_args(list(words))
    if flags.config:
        of_file = _words_of_yaml(flags.config)
        require_known(_flags_in(of_file), known, where=f"--config {flags.config}: ")
        flags = parser.parse_args([*of_file, *words])
    for name in ("prompt_data", "hf_checkpoint", "save"):
        if not getattr(flags, name):
            raise ConfigError(f"{flag_of(name)} is missing")
    for name in ONE_VALUE:
        require_one_value(name, getattr(flags, name))
    _require_mask_type(flags)
    batch = flags.rollout_batch_size or flags.global_batch_size or OrderConfig.batch_size
    if flags.global_batch_size and flags.global_batch_size != batch:
        raise ConfigError(
            f"--rollout-batch-size {flags.rollout_batch_size} and --global-batch-size {flags.global_batch_size} must "
            "be equal: one batch read is one optimizer step"
        )
    cluster = ClusterConfig(
        num_nodes=flags.actor_num_nodes,
        gpus_per_node=flags.actor_num_gpus_per_node,
        num_gpus_per_node=flags.num_gpus_per_node,
        tensor=flags.tensor_model_parallel_size,
        pipeline=flags.pipeline_model_parallel_size,
        expert=flags.expert_model_parallel_size,
        expert_tensor=flags.expert_tensor_parallel_size,
        sequence_parallel=flags.sequence_parallel,
        ray_address=flags.ray_address,
        timeout_minutes=flags.distributed_timeout_minutes,
    )
    layout = cluster.layout
    _require_model(flags, layout)
    data = DataConfig(
        sources=_sources("--prompt-data", flags.prompt_data, _row_format(flags)),
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
        held_out_fraction=flags.eval_fraction,
    )
    return TrainConfig(
        hf_checkpoint=flags.hf_checkpoint,
        ref_load=flags.ref_load or flags.load or flags.save,
        save=flags.save,
        data=data,
        load=flags.load,
        save_interval=flags.save_interval,
        save_hf=flags.save_hf,
        keep_last=flags.keep_last,
        keep_best=flags.keep_best,
        max_skipped_steps=flags.max_skipped_steps,
        max_restarts=flags.max_restarts,
        on_save_error=flags.on_save_error,
        deterministic=flags.deterministic_mode,
        output_dir=flags.output_dir,
        num_rollout=flags.num_rollout,
        optimizer=OptimizerSettings(
            lr=flags.lr,
            min_lr=flags.min_lr,
            lr_decay_style=flags.lr_decay_style,
            lr_warmup_iters=flags.lr_warmup_iters,
            lr_warmup_fraction=flags.lr_warmup_fraction,
            weight_decay=flags.weight_decay,
            adam_beta1=flags.adam_beta1,
            adam_beta2=flags.adam_beta2,
            adam_eps=flags.adam_eps,
            clip_grad=flags.clip_grad,
        ),
        cluster=cluster,
        seed=flags.seed,
        bf16=flags.bf16,
        recompute=RecomputeConfig(
            flags.recompute_granularity, flags.recompute_method, flags.recompute_num_layers
        ),
        evaluation=EvalConfig(
            sources=_sources("--eval-prompt-data", flags.eval_prompt_data, _row_format(flags)),
            interval=flags.eval_interval,
            num_samples=flags.eval_samples,
            max_response_tokens=flags.eval_max_response_len,
        ),
        logging=LoggingConfig(
            use_tensorboard=flags.use_tensorboard,
            use_wandb=flags.use_wandb,
            wandb_project=flags.wandb_project,
            wandb_group=flags.wandb_group,
            wandb_mode=flags.wandb_mode,
        ),
        dry_run=flags.dry_run,
    )


def _flags_in(words: Sequence[str]) -> list[str]:
    return [word.split("=")[0] for word in words if word.startswith("--")]


def _words_of_yaml(path: str) -> list[str]:
    try:
        with storage.reading(path):
            text = storage.read_text(path)
        content = yaml.safe_load(text)
    except SourceError as error:
        raise ConfigError(f"--config {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not YAML ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: expected a mapping of flag names to values")
    words: list[str] = []
    for key, value in content.items():
        flag = flag_of(str(key))
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            values = value if isinstance(value, list) else [value]
            words += [
                flag,
                *(json.dumps(item) if isinstance(item, dict) else str(item) for item in values),
            ]
    return words


def _require_mask_type(flags: argparse.Namespace) -> None:
    if flags.loss_mask_type not in ("auto", "qwen", "qwen3"):
        raise ConfigError(
            f"--loss-mask-type {flags.loss_mask_type}: the mask is learned from the chat template and certified, "
            "whatever the model; leave the flag out, or give auto (qwen and qwen3 are taken to mean the same)"
        )


def _require_model(flags: argparse.Namespace, layout: Layout) -> None:
    """The layout, and the sizes on the launch line, against config.json."""
    shape = read_shape(flags.hf_checkpoint)
    layout.require_fits(shape)
    given = {name: getattr(flags, name) for name in SIZES if getattr(flags, name) is not None}
    given.update({name: True for name in SWITCHES if getattr(flags, name)})
    wanted = shape.megatron_args()
    wanted["disable_bias_linear"] = not wanted["add_bias_linear"]
    wrong = [
        f"{flag_of(name)} {value}: config.json says {wanted.get(name)}"
        for name, value in given.items()
        if wanted.get(name) != value
    ]
    if wrong:
        raise ConfigError(
            f"the model's sizes are those of {flags.hf_checkpoint}; the launch line says otherwise:\n  "
            + "\n  ".join(wrong)
        )


def _row_format(flags: argparse.Namespace) -> RowFormat:
    columns = named_columns(flags.column_names, flags.input_key, flags.tool_key)
    return RowFormat(flags.row_shape, columns, flags.role_names)


def _sources(flag: str, words: Sequence[str], format: RowFormat) -> tuple[SourceConfig, ...]:
    """One path, or name path pairs."""
    if len(words) == 1:
        name = words[0].rstrip("/").rsplit("/", 1)[-1].split(".")[0] or "data"
        return (SourceConfig(name, (words[0],), format),)
    if len(words) % 2:
        raise ConfigError(f"{flag} takes one path, or NAME PATH pairs; found {len(words)} words")
    return tuple(
        SourceConfig(name, (path,), format)
        for name, path in zip(words[::2], words[1::2], strict=True)
    )
