"""Flags of Miles's launch lines that are no settings here: accepted with one value, or refused.

Nothing is ignored in silence. A flag that can only say what is always so (`ONE_VALUE`, `ALWAYS`) is
accepted where it says that. The model's sizes (`SIZES`, `SWITCHES`) are compared with config.json.
A flag that means nothing in supervised fine-tuning, or that is not supported, is refused by name,
with what to do.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from miles.common.flags import Flag, Setting, Values
from miles.errors import ConfigError

_SFT_ONLY = ": this is SFT only; leave it out or give {values}"


@dataclass(frozen=True)
class OneValue:
    """A flag that has one meaning here; each of `values` stands for it."""

    name: str
    values: tuple[str, ...]
    refusal: str = " is not supported; leave it out or give {values}"
    """the error for any other value, from that value on"""


ONE_VALUE: tuple[OneValue, ...] = (
    OneValue("loss_type", ("sft_loss",), _SFT_ONLY),
    OneValue(
        "rollout_function_path",
        ("miles.rollout.sft_rollout.generate_rollout",),
        _SFT_ONLY,
    ),
    OneValue("n_samples_per_prompt", ("1",), _SFT_ONLY),
    OneValue(
        "loss_mask_type",
        ("auto", "qwen", "qwen3"),
        ": the mask is learned from the chat template and certified, whatever the model; leave the "
        "flag out, or give auto (qwen and qwen3 are taken to mean the same)",
    ),
    OneValue("train_backend", ("megatron",)),
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
    OneValue("rotary_percent", ("1.0",)),
    OneValue("attention_dropout", ("0.0",)),
    OneValue("hidden_dropout", ("0.0",)),
    OneValue("attention_backend", ("flash", "auto")),
    OneValue("qkv_format", ("thd",)),
    OneValue("ckpt_format", ("torch_dist",)),
    OneValue("moe_router_score_function", ("softmax",)),
    OneValue("moe_token_dispatcher_type", ("alltoall",)),
    OneValue("moe_router_dtype", ("fp32",)),
    # of no effect beside --moe-aux-loss-coeff 0
    OneValue("moe_router_load_balancing_type", ("none", "aux_loss", "seq_aux_loss")),
    OneValue("moe_aux_loss_coeff", ("0",)),
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
    "no_rope_fusion": "rotary embeddings have no fused kernel",
    "async_save": "checkpoints are written while the training continues",
    "no_gradient_accumulation_fusion": "gradients are accumulated without a fused kernel",
    "disable_wandb_random_suffix": "group and name of a run get no suffix there",
    "wandb_always_use_train_step": "curves are drawn over the training's steps",
}
"""Switch -> what it says, which is always so."""

SIZES: Mapping[str, type] = {
    "num_layers": int,
    "hidden_size": int,
    "ffn_hidden_size": int,
    "num_attention_heads": int,
    "num_query_groups": int,
    "kv_channels": int,
    "vocab_size": int,
    "rotary_base": int,
    "rope_scaling_factor": float,
    "norm_epsilon": float,
    "num_experts": int,
    "moe_ffn_hidden_size": int,
    "moe_router_topk": int,
}
"""Flags of Miles's model scripts; they must say what config.json says."""

SWITCHES: tuple[str, ...] = (
    "swiglu",
    "group_query_attention",
    "use_rotary_position_embeddings",
    "use_rope_scaling",
    "qk_layernorm",
    "add_qkv_bias",
    "disable_bias_linear",
    "untie_embeddings_and_output_weights",
)
"""Switches of Miles's model scripts; they must say what config.json says, too."""


@dataclass(frozen=True)
class Refusal:
    """Flags that are refused for one reason."""

    reason: str
    remedy: str
    names: str
    """divided by blanks; one that ends in `*` stands for all names that begin like it"""

    def covers(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.names.split())


REFUSALS = (
    Refusal(
        "belongs to the loss of reinforcement learning",
        "leave it out: the loss here is cross-entropy",
        """
        advantage_estimator kl_coef kl_loss_coef kl_loss_type use_kl_loss entropy_coef eps_clip
        eps_clip_high eps_clip_c value_clip gamma lambd normalize_advantages use_tis tis_*
        use_rollout_logprobs disable_grpo_std_normalization ref_update_interval critic_*
        num_critic_only_steps reset_optimizer_states get_mismatch_metrics use_opd opd_*
        """,
    ),
    Refusal(
        "belongs to rewards",
        "leave it out: rows carry their own answers",
        """
        rm_type rm_url custom_rm_path group_rm reward_key eval_reward_key label_key
        custom_reward_post_process_path metadata_key custom_convert_samples_to_train_data_path
        """,
    ),
    Refusal(
        "belongs to the engines that generate rollouts",
        "leave it out: the rows of --prompt-data are the samples",
        """
        rollout_num_gpus rollout_num_gpus_per_engine rollout_max_* rollout_temperature rollout_top_p
        rollout_top_k rollout_stop rollout_stop_token_ids rollout_skip_special_tokens
        rollout_health_check_* rollout_external rollout_external_engine_addrs rollout_global_dataset
        rollout_data_postprocess_path rollout_sample_filter_path rollout_all_samples_process_path
        over_sampling_batch_size over_sampling_filter_path dynamic_sampling_filter_path
        partial_rollout mask_offpolicy_in_partial_rollout buffer_filter_path custom_generate_*
        num_steps_per_rollout balance_data use_fault_tolerance colocate offload* sglang_*
        update_weight* update_weights_interval keep_old_actor use_miles_router miles_router_*
        prefill_num_servers debug_rollout_only load_debug_* save_debug_* start_rollout_id
        """,
    ),
    Refusal(
        "belongs to evaluation by generating and scoring",
        "evaluation here is the loss on --eval-prompt-data or --eval-fraction, and --eval-samples "
        "answers",
        """
        n_samples_per_eval_prompt eval_temperature eval_top_p eval_top_k eval_input_key
        eval_label_key eval_tool_key eval_function_path eval_config eval_max_context_len
        eval_max_prompt_len skip_eval_before_train log_passrate
        """,
    ),
    Refusal(
        "is the size of a batch by other names",
        "a step is --rollout-batch-size rows, packed into micro-batches of --max-tokens-per-gpu "
        "tokens",
        """
        micro_batch_size seq_length ref_micro_batch_size log_probs_max_tokens_per_gpu
        log_probs_chunk_size
        """,
    ),
    Refusal(
        "is the length of a run by other names",
        "give --num-epoch, or --num-rollout for a number of steps; the schedule spans the run",
        """
        train_iters train_samples lr_decay_iters lr_decay_samples lr_warmup_samples
        """,
    ),
    Refusal(
        "belongs to the evaluation or the data of pre-training in Megatron-LM",
        "leave it out: rows come from --prompt-data",
        """
        data_path split train_data_path valid_data_path test_data_path data_cache_path
        tokenizer_type tokenizer_model vocab_file merge_file eval_iters dataloader_type
        """,
    ),
    Refusal(
        "is not supported yet",
        "leave it out",
        """
        lora_rank lora_alpha lora_dropout target_modules optimizer_cpu_offload
        overlap_cpu_optimizer_d2h_h2d use_precision_aware_optimizer main_grads_dtype
        main_params_dtype exp_avg_dtype exp_avg_sq_dtype fp8* fp16 overlap_grad_reduce
        overlap_param_gather virtual_pipeline_model_parallel_size
        num_layers_per_virtual_pipeline_stage num_virtual_stages_* decoder_first_pipeline_num_layers
        decoder_last_pipeline_num_layers pipeline_model_parallel_layout moe_grouped_gemm
        moe_permute_fusion moe_enable_deepep moe_token_drop_policy moe_layer_freq moe_shared_*
        moe_router_pre_softmax multi_latent_attention mtp_* transformer_impl use_torch_fsdp2
        use_megatron_fsdp cp_comm_type allgather_cp tp_comm_overlap clip_grad_by_value
        weight_decay_incr_style start_weight_decay end_weight_decay no_load_optim no_load_rng
        no_save_optim finetune use_mlflow profile* use_pytorch_profiler
        """,
    ),
)
"""Flags that are refused by name."""


FIXED_TITLE = "Flags of launch scripts that have one value here"
SIZES_TITLE = "The model's sizes: config.json decides; where given they must say the same"


def flag_of(name: str) -> str:
    """Return the flag of a name: `max_tokens_per_gpu` -> `--max-tokens-per-gpu`."""
    return "--" + name.replace("_", "-")


def fixed_settings() -> list[Setting]:
    """Return the flags of `ONE_VALUE` and `ALWAYS`, to be added to a parser."""
    settings = []
    for fixed in ONE_VALUE:
        flag = Flag(flag_of(fixed.name), "VALUE", f"always {' or '.join(fixed.values)}")
        settings.append(Setting(flag, value_type=Any, default=fixed.values[0]))
    for name, meaning in ALWAYS.items():
        settings.append(Setting(Flag(flag_of(name), help=f"always so: {meaning}"), value_type=bool))
    return settings


def values_of_fixed(flag: str) -> tuple[str, ...]:
    """Return the values that one of the flags of `ONE_VALUE` takes."""
    return next(fixed.values for fixed in ONE_VALUE if flag_of(fixed.name) == flag)


def size_settings() -> list[Setting]:
    """Return the flags of `SIZES` and `SWITCHES`, to be added to a parser."""
    settings = []
    for name, number in SIZES.items():
        settings.append(Setting(Flag(flag_of(name), "N", "as config.json says"), value_type=number))
    for name in SWITCHES:
        settings.append(Setting(Flag(flag_of(name), help="as config.json says"), value_type=bool))
    return settings


def require_known(flag: str, known: Collection[str], where: str = "") -> None:
    """Check that a flag is one of those that exist here.

    Args:
        flag: as it is written, `--name`.
        known: the flags of a parser.
        where: stands before the message.

    Raises:
        ConfigError: names the flag, why it is refused, and what to do.
    """
    if flag in known:
        return
    name = flag.removeprefix("--").replace("-", "_")
    for refusal in REFUSALS:
        if refusal.covers(name):
            raise ConfigError(f"{where}{flag} {refusal.reason}; {refusal.remedy}")

    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]}?" if near else "see miles train --help or docs/flags.md"
    raise ConfigError(f"{where}there is no flag {flag}; {hint}")


def require_fixed(values: Values) -> None:
    """Check the flags that may only say what is always so.

    Raises:
        ConfigError: one of them says something else.
    """
    for fixed in ONE_VALUE:
        value = values.get(flag_of(fixed.name))
        if value is not None and not _is_one_of(value, fixed.values):
            refusal = fixed.refusal.format(values=" or ".join(fixed.values))
            raise ConfigError(f"{flag_of(fixed.name)} {value}{refusal}")

    for name, meaning in ALWAYS.items():
        if values.get(flag_of(name)) is False:
            raise ConfigError(
                f"{flag_of(name)}: false is not supported, it is always so ({meaning}); "
                "leave it out"
            )


def differences_from(shape: Mapping[str, Any], values: Values) -> list[str]:
    """Return a line for each size on a launch line that is not the model's.

    Args:
        shape: Megatron's arguments for the model, by name.
    """
    differences = []
    for name in (*SIZES, *SWITCHES):
        value = values.get(flag_of(name))
        if value is not None and shape.get(name) != value:
            differences.append(f"{flag_of(name)} {value}: config.json says {shape.get(name)}")
    return differences


def _is_one_of(value: str, allowed: tuple[str, ...]) -> bool:
    """Compare as text, or as numbers: `0` is `0.0`."""
    number = _number(value)
    return value in allowed or (number is not None and number in map(_number, allowed))


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
