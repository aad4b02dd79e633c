"""Flags of launch scripts that are taken although they are no settings here.

--loss-type sft_loss     `ONE_VALUE`: it may only say what is always so; other values are refused
--balance-data           `ALWAYS`: a switch that says what is always so
--moe-permute-fusion     `REPLACED`: it chooses how something is computed; a notice says what is
                         done instead
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles.common.flags import Flag, Setting, Values, flag_of
from miles.common.mistakes import Mistakes

FIXED_TITLE = "Flags of launch scripts that have one value here"
REPLACED_TITLE = "Flags of launch scripts that choose a way to compute: taken, with a notice"

_SFT_ONLY = ": this is SFT only; leave it out or give {values}"
_PADDING = "the vocabulary gets the rows of padding that the layout needs, which are no tokens"
BALANCED_BY = "--moe-aux-loss-coeff"
"""The flag for the weight of the loss that balances experts, a setting."""
BALANCING = "moe_router_load_balancing_type"
"""The flag for what --moe-aux-loss-coeff is the weight of. Beside 0 it has no effect."""
_STEP_BALANCING = ("aux_loss", "global_aux_loss")
"""Its values that stand for a loss over the tokens of many samples together."""
_NO_EXPERT_DROPS = ": no expert drops tokens; leave it out or give {values}"


@dataclass(frozen=True)
class OneValue:
    """A flag that has one meaning here; each of `values` stands for it."""

    name: str
    values: tuple[str, ...]
    refusal: str = " is not supported; leave it out or give {values}"
    """the error for any other value, from that value on"""


@dataclass(frozen=True)
class Replaced:
    """A flag that chooses how something is computed, and changes none of what is computed."""

    name: str
    notice: str
    """what is done here"""
    value_type: type = bool


ONE_VALUE: tuple[OneValue, ...] = (
    OneValue("loss_type", ("sft_loss",), _SFT_ONLY),
    OneValue(
        "rollout_function_path",
        ("miles.rollout.sft_rollout.generate_rollout",),
        _SFT_ONLY,
    ),
    OneValue("n_samples_per_prompt", ("1",), _SFT_ONLY),
    OneValue(
        "num_steps_per_rollout",
        ("1",),
        ": one step is taken for each --rollout-batch-size rows; leave it out or give {values}",
    ),
    OneValue(
        "loss_mask_type",
        ("auto", "qwen", "qwen3"),
        ": the mask is learned from the chat template and certified, whatever the model; leave the "
        "flag out, or give auto (qwen and qwen3 are taken to mean the same: docs/masks.md)",
    ),
    OneValue("train_backend", ("megatron",)),
    OneValue(
        "distributed_backend",
        ("nccl",),
        ": ranks with GPUs use nccl, those without gloo; leave it out or give {values}",
    ),
    OneValue("object_store_backend", ("ray",)),
    OneValue(
        "main_grads_dtype",
        ("fp32",),
        ": gradients are summed in float32 (--accumulate-allreduce-grads-in-fp32); leave it out or "
        "give {values}",
    ),
    OneValue(
        "megatron_to_hf_mode",
        ("raw",),
        ": weights are converted by the parameter map of the model's family; leave it out or give "
        "{values}",
    ),
    OneValue("optimizer", ("adam",)),
    OneValue(
        "context_parallel_size",
        ("1",),
        ": context parallelism is not supported yet; leave it out. Room for long samples comes "
        "from --tensor-model-parallel-size with --sequence-parallel, and from "
        "--recompute-granularity",
    ),
    OneValue("normalization", ("RMSNorm",)),
    OneValue("position_embedding_type", ("rope",)),
    OneValue("rope_type", ("rope",)),
    OneValue("rotary_percent", ("1.0",)),
    OneValue("attention_dropout", ("0.0",)),
    OneValue("hidden_dropout", ("0.0",)),
    OneValue("qkv_format", ("thd",)),
    OneValue("ckpt_format", ("torch_dist",)),
    OneValue("moe_router_score_function", ("softmax",)),
    OneValue("moe_token_dispatcher_type", ("alltoall",)),
    OneValue("moe_token_drop_policy", ("probs", "position"), _NO_EXPERT_DROPS),
    OneValue("moe_router_dtype", ("fp32",)),
    OneValue("moe_router_topk_scaling_factor", ("1.0",)),
    OneValue("moe_router_num_groups", ("1",)),
    OneValue("moe_router_group_topk", ("1",)),
    OneValue("moe_router_bias_update_rate", ("0",)),
    OneValue(BALANCING, ("none", "aux_loss", "seq_aux_loss", "global_aux_loss")),
    OneValue("moe_z_loss_coeff", ("0",)),
)
"""Flags that may only say what is always so."""

ALWAYS: Mapping[str, str] = {
    "calculate_per_token_loss": "the loss is a sum over trained tokens, divided by their number",
    "disable_compute_advantages_and_returns": "there are none",
    "debug_train_only": "nothing is generated but --eval-samples",
    "use_dynamic_batch_size": "micro-batches are packed up to --max-tokens-per-gpu",
    "use_distributed_optimizer": "optimizer state is spread over the data-parallel ranks",
    "accumulate_allreduce_grads_in_fp32": "gradients are summed in float32",
    "attention_softmax_in_fp32": "attention's softmax is computed in float32",
    "apply_chat_template": "the tokenizer's template, or --chat-template-path",
    "no_bias_gelu_fusion": "no activation is GELU",
    "no_bias_dropout_fusion": "there is no dropout, and nothing to fuse the residual's addition with",
    "use_flash_attn": "attention on GPUs is flash attention; --attention-backend says whose",
    "no_initialization": "the weights come from a checkpoint",
    "exit_signal_handler": "SIGTERM saves and ends the process",
    "log_throughput": "perf/tflops_per_gpu is logged at every step",
    "no_one_logger": "nothing is sent to NVIDIA's one-logger",
    "async_save": "checkpoints are written while the training continues",
    "balance_data": "a step's samples are balanced over the data-parallel ranks by their tokens",
    "allow_partial_train_step": "the short step at an epoch's end is trained, without --drop-last",
    "disable_rollout_trim_samples": "no sample is left out to make a step even",
    "use_dynamic_global_batch_size": "a step is as many samples as its rows give",
    "delay_split_train_data_by_dp": "the feed hands each data-parallel rank its part of a step",
    "no_position_embedding": "positions are rotary, not learned",
    "no_masked_softmax_fusion": "attention's softmax has no fused kernel of Megatron's",
    "use_cpu_initialization": "the weights come from a checkpoint",
    "use_mcore_models": "the model is megatron-core's",
    "variable_seq_lengths": "micro-batches have as many tokens as their samples",
    "no_create_attention_mask_in_dataloader": "attention knows the edges of packed samples",
    "disable_wandb_random_suffix": "group and name of a run get no suffix there",
    "wandb_always_use_train_step": "curves are drawn over the training's steps",
}
"""Switch -> what it says, which is always so."""

REPLACED: tuple[Replaced, ...] = (
    Replaced("moe_use_legacy_grouped_gemm", "the grouped product of --moe-grouped-gemm is torch's"),
    Replaced("moe_permute_fusion", "tokens are sorted by expert without a fused kernel"),
    Replaced("moe_router_fusion", "the router has no fused kernel"),
    Replaced("make_vocab_size_divisible_by", _PADDING, int),
    Replaced("padded_vocab_size", _PADDING, int),
    Replaced("data_pad_size_multiplier", "micro-batches are padded as the layout needs it", int),
    Replaced("log_interval", "every step is logged", int),
    Replaced("manual_gc", "Python collects its garbage when it likes to"),
    Replaced("no_manual_gc_eval", "Python collects its garbage when it likes to"),
    Replaced("manual_gc_interval", "Python collects its garbage when it likes to", int),
)
"""Flags that choose a way to compute, and what is done here."""


def fixed_settings() -> list[Setting]:
    """Return the flags of `ONE_VALUE` and `ALWAYS`, to be added to a parser."""
    settings = []
    for fixed in ONE_VALUE:
        flag = Flag(flag_of(fixed.name), "VALUE", f"always {' or '.join(fixed.values)}")
        settings.append(Setting(flag, value_type=Any, default=fixed.values[0]))
    for name, meaning in ALWAYS.items():
        settings.append(Setting(Flag(flag_of(name), help=f"always so: {meaning}"), value_type=bool))
    return settings


def replaced_settings() -> list[Setting]:
    """Return the flags of `REPLACED`, to be added to a parser."""
    settings = []
    for replaced in REPLACED:
        metavar = "" if replaced.value_type is bool else "N"
        flag = Flag(flag_of(replaced.name), metavar, replaced.notice)
        settings.append(Setting(flag, value_type=replaced.value_type))
    return settings


def values_of_fixed(flag: str) -> tuple[str, ...]:
    """Return the values that one of the flags of `ONE_VALUE` takes."""
    return next(fixed.values for fixed in ONE_VALUE if flag_of(fixed.name) == flag)


def require_fixed(values: Values) -> None:
    """Check the flags that may only say what is always so.

    Raises:
        ConfigError: names those that say something else.
    """
    mistakes = Mistakes()
    for fixed in ONE_VALUE:
        value = values.get(flag_of(fixed.name))
        refusal = fixed.refusal.format(values=" or ".join(fixed.values))
        mistakes.require(
            value is None or _is_one_of(value, fixed.values),
            f"{flag_of(fixed.name)} {value}{refusal}",
        )

    balancing = values.get(flag_of(BALANCING), _STEP_BALANCING[0])
    coefficient = values.get(BALANCED_BY)
    mistakes.require(
        not coefficient or balancing in _STEP_BALANCING,
        f"{flag_of(BALANCING)} {balancing} beside {BALANCED_BY} {coefficient}: experts are balanced "
        f"over all tokens of a step; leave it out or give {' or '.join(_STEP_BALANCING)}",
    )

    for name, meaning in ALWAYS.items():
        mistakes.require(
            values.get(flag_of(name)) is not False,
            f"{flag_of(name)}: false is not supported, it is always so ({meaning}); leave it out",
        )
    mistakes.raise_all()


def _is_one_of(value: str, allowed: tuple[str, ...]) -> bool:
    """Compare as text, or as numbers: `0` is `0.0`."""
    number = _number(value)
    return value in allowed or (number is not None and number in map(_number, allowed))


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
