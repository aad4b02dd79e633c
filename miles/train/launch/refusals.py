"""Flags of Miles and of Megatron-LM that are refused by name, with the reason and what to do.

    --kl-coef 0.1  ->  --kl-coef belongs to the loss of reinforcement learning; leave it out: the
                       loss here is cross-entropy

Nothing is ignored in silence, and no name of a launch script is called unknown: that is for names
that Miles does not have either.
"""

from __future__ import annotations

from miles.train.launch.model_refusals import MODEL_REFUSALS
from miles.train.launch.refusal import Refusal

_ROWS = "leave it out: the rows of --prompt-data are the samples"

_REINFORCEMENT = (
    Refusal(
        "belongs to the loss of reinforcement learning",
        "leave it out: the loss here is cross-entropy",
        """
        advantage_estimator kl_coef kl_loss_coef kl_loss_type use_kl_loss use_unbiased_kl
        entropy_coef observe_training_entropy use_rollout_entropy eps_clip eps_clip_high eps_clip_c
        value_clip gamma lambd normalize_advantages use_tis tis_* custom_tis_* use_opsm opsm_delta
        use_rollout_logprobs disable_grpo_std_normalization ref_update_interval critic_*
        num_critic_only_steps reset_optimizer_states get_mismatch_metrics use_opd opd_*
        custom_pg_* skip_actor_forward_only log_probs_max_tokens_per_gpu log_probs_chunk_size
        true_on_policy_mode recompute_logprobs_via_prefill custom_megatron_before_log_prob_*
        use_routing_replay use_rollout_routing_replay use_indexer_replay use_rollout_indexer_replay
        moe_enable_routing_replay perform_rl_step rl_* grpo_* langrl_*
        """,
    ),
    Refusal(
        "belongs to rewards",
        "leave it out: rows carry their own answers",
        """
        rm_type rm_url custom_rm_path group_rm reward_key eval_reward_key label_key
        custom_reward_post_process_path metadata_key custom_convert_samples_to_train_data_path
        disable_rewards_normalization log_reward_category log_correct_samples
        """,
    ),
    Refusal(
        "belongs to the engines that generate rollouts",
        _ROWS,
        """
        rollout_num_gpus rollout_num_gpus_per_engine rollout_max_* rollout_temperature rollout_top_p
        rollout_top_k rollout_stop rollout_stop_token_ids rollout_skip_special_tokens
        rollout_health_check_* rollout_external* over_sampling_* dynamic_sampling_filter_path
        partial_rollout mask_offpolicy_in_partial_rollout rollout_submission_granularity
        custom_generate_* custom_rollout_log_function_path log_multi_turn sglang_* router_*
        use_miles_router miles_router_* prefill_num_servers debug_rollout_only
        pin_rollout_manager_to_head http_proxy use_distributed_post no_sglang_* eval_sglang_*
        inference_* flash_decode moe_pad_experts_for_cuda_graph_inference
        """,
    ),
    Refusal(
        "belongs to generating rollouts while the model is trained",
        _ROWS,
        """
        fully_async max_weight_staleness async_max_* async_data_buffer_* async_unused_*
        custom_async_*
        """,
    ),
    Refusal(
        "belongs to the buffers and filters of generated samples",
        "leave it out: a row that cannot be trained is dropped and counted, and --eval-fraction "
        "holds rows out",
        """
        buffer_filter_path rollout_sample_filter_path rollout_all_samples_process_path
        rollout_data_postprocess_path rollout_buffer_url fetch_trajectory_retry_times
        min_batch_collection_ratio rollout_task_type
        """,
    ),
    Refusal(
        "belongs to agents that keep sessions with an engine",
        _ROWS,
        "use_session_server session_* tito_model",
    ),
    Refusal(
        "belongs to sending weights to the engines",
        "leave it out: no engine has to follow the weights; --save-hf writes them",
        """
        update_weight* update_weights_interval keep_old_actor check_weight_update_*
        debug_skip_weight_update p2p_transfer_* pause_generation_mode custom_update_weight_*
        extra_high_precision_layers_*
        """,
    ),
    Refusal(
        "belongs to sharing GPUs between training and the engines that generate rollouts",
        "leave it out: the trainers have their GPUs for themselves",
        """
        colocate* offload offload_train* offload_rollout* no_offload_* train_memory_margin_bytes
        rematerialize_param_* check_rematerialize_* clear_quantized_*
        """,
    ),
)

_EVALUATION = (
    Refusal(
        "belongs to evaluation by generating and scoring",
        "evaluation here is the loss on --eval-prompt-data or --eval-fraction, and --eval-samples "
        "answers",
        """
        n_samples_per_eval_prompt eval_temperature eval_top_p eval_top_k eval_input_key
        eval_label_key eval_tool_key eval_function_path eval_config eval_max_context_len
        eval_max_prompt_len eval_min_new_tokens eval_num_gpus* eval_hf_dir eval_keep_snapshots
        eval_max_in_flight eval_overflow_policy skip_eval_before_train log_passrate
        custom_eval_rollout_*
        """,
    ),
    Refusal(
        "belongs to the evaluation or the data of pre-training in Megatron-LM",
        "leave it out: rows come from --prompt-data",
        """
        data_path train_data_path valid_data_path test_data_path data_cache_path
        tokenizer_type tokenizer_model vocab_file merge_file eval_iters dataloader_type num_workers
        reset_position_ids reset_attention_mask eod_mask_loss mock_data data_args_path
        per_split_data_args_path no_mmap_bin_files num_dataset_builder_threads tokenizer_metadata
        tiktoken_* legacy_tokenizer no_use_tokenizer_model_* no_data_sharding full_validation
        multiple_validation_sets skip_train test_mode
        """,
    ),
)

_DATA = (
    Refusal(
        "replaces the source of the rows by code",
        "leave it out: rows come from --prompt-data, in the shape of --row-shape",
        "data_source_path disable_rollout_global_dataset rollout_global_dataset",
    ),
    Refusal(
        "names columns with images, sound or video",
        "leave it out: rows of text are trained; a conversation with other parts is dropped and "
        "counted",
        "multimodal_keys",
    ),
    Refusal(
        "is the size of a batch by other names",
        "a step is --rollout-batch-size rows, packed into micro-batches of --max-tokens-per-gpu "
        "tokens",
        "micro_batch_size ref_micro_batch_size rampup_batch_size decrease_batch_size_if_needed",
    ),
    Refusal(
        "is the length of all samples in pre-training",
        "leave it out: samples keep their own lengths; --max-sample-tokens is the longest, and "
        "--max-tokens-per-gpu what a micro-batch holds",
        "seq_length encoder_seq_length decoder_seq_length",
    ),
    Refusal(
        "balances micro-batches by their operations and lets them exceed --max-tokens-per-gpu",
        "leave it out: they are balanced by tokens, and none is larger",
        "balance_by_flops",
    ),
    Refusal(
        "is the length of a run by other names",
        "give --num-epoch, or --num-rollout for a number of steps; the schedule spans the run",
        "train_iters train_samples lr_decay_iters lr_decay_samples lr_warmup_samples",
    ),
    Refusal(
        "ends the process before the run's end",
        "leave it out: SIGTERM saves and ends the process, and the same command goes on; "
        "--num-rollout makes a shorter run",
        "debug_exit_after_rollout exit_interval exit_duration_in_mins",
    ),
    Refusal(
        "is the first step of a run",
        "leave it out: a run goes on where the checkpoint of --save or --load ends",
        "start_rollout_id",
    ),
)

_CODE = (
    Refusal(
        "names a loss of your own",
        "leave it out: the loss here is cross-entropy over the trained tokens",
        "custom_loss_function_path",
    ),
    Refusal(
        "names a model of your own",
        "leave it out: the model is that of config.json; docs/adding-a-model.md says how a family "
        "is added",
        "custom_model_provider_path spec model_name",
    ),
    Refusal(
        "names a function for Miles's trainer to call",
        "leave it out; the loop is short and written to be read (miles/train/README.md)",
        """
        custom_megatron_init_path custom_megatron_before_train_step_* custom_megatron_post_save_*
        """,
    ),
    Refusal(
        "names a file of Miles's own settings",
        "give flags in a file by --config (docs/flags.md)",
        "custom_config_path",
    ),
)

_DIAGNOSTICS = (
    Refusal(
        "belongs to the tests of Miles itself",
        "leave it out",
        "ci_*",
    ),
    Refusal(
        "writes or reads records for Miles's own tools",
        "leave it out: the run's folder has its configuration, log, first batch, dropped rows and "
        "ledger; miles inspect shows the masks of rows",
        """
        dump_details dumper_* save_debug_* load_debug_* enable_event_analyzer enable_witness
        witness_buffer_size save_local_weight_checksum env_report* enable_sample_*
        """,
    ),
    Refusal(
        "profiles the training",
        "leave it out; perf/* in metrics.jsonl has times, and --dry-run estimates memory",
        """
        profile profile_* use_pytorch_profiler memory_recorder memory_snapshot_*
        record_memory_history
        """,
    ),
    Refusal(
        "sends metrics to a service that is not supported",
        "leave it out: metrics go to metrics.jsonl, --use-tensorboard and --use-wandb",
        "use_mlflow mlflow_* use_prometheus prometheus_*",
    ),
    Refusal(
        "is the team that a project belongs to, by another name",
        "give --wandb-team",
        "wandb_entity",
    ),
    Refusal(
        "is the name of the run at Weights & Biases",
        "leave it out: that is the name of the run's folder, --output-dir; --wandb-group names a "
        "group",
        "wandb_name wandb_exp_name wandb_run_name",
    ),
    Refusal(
        "is the local folder of Weights & Biases, by another name",
        "give --wandb-dir",
        "wandb_save_dir",
    ),
    Refusal(
        "chooses what is logged",
        "leave it out: docs/metrics.md lists what is logged at every step",
        """
        log_params_norm log_num_zeros_in_grad log_progress log_energy log_timers_* log_memory_*
        log_world_size_* log_validation_* log_max_attention_logit log_straggler straggler_*
        disable_straggler_* no_log_loss_scale_* no_barrier_with_level_1_timing timing_log_*
        tensorboard_log_interval tensorboard_queue_size logging_level config_logger_dir one_logger_*
        app_tag_* moe_per_layer_logging
        """,
    ),
    Refusal(
        "belongs to Megatron-LM's own checks of loss and gradient",
        "leave it out: a step whose loss or gradient is NaN or infinite is skipped, and "
        "skipped_steps.jsonl names its rows",
        """
        no_check_for_nan_in_loss_and_grad check_for_spiky_loss check_for_large_grads rerun_mode
        error_injection_* result_rejected_*
        """,
    ),
    Refusal(
        "is the folder of TensorBoard",
        "leave it out: --use-tensorboard writes to tensorboard/ in the run's folder, --output-dir",
        "tb_project_name tb_experiment_name tensorboard_dir",
    ),
    Refusal(
        "is the peak of a GPU",
        "leave it out: perf/mfu knows the usual GPUs, and perf/tflops_per_gpu is always logged",
        "mfu_peak_tflops",
    ),
    Refusal(
        "trains without an optimizer, which changes no weight",
        "--dry-run estimates memory and counts steps",
        "debug_disable_optimizer",
    ),
    Refusal(
        "makes sums over ranks come out the same",
        "give --deterministic-mode",
        "debug_deterministic_collective debug_unified_*",
    ),
)

_CLUSTER = (
    Refusal(
        "belongs to other ways of recovery from failures",
        "leave it out: a run that lost a process starts again from its last checkpoint, "
        "--max-restarts times",
        """
        use_fault_tolerance ft_components mini_ft_controller_* no_mini_ft_* control_server_port
        api_server_* indep_dp trainer_heartbeat_* inprocess_* enable_ft_package calc_ft_timeouts
        adlr_autoresume*
        """,
    ),
    Refusal(
        "belongs to a store for rollouts beside Ray's",
        "leave it out: rows travel through Ray's object store",
        "mooncake_*",
    ),
    Refusal(
        "belongs to other ways of starting the workers",
        "leave it out: Ray starts them",
        "cluster_backend worker_comm_backend deploy_* run_uuid init_expected_* "
        "trainer_controller_* inference_controller_* custom_inference_*",
    ),
)

_CHECKPOINTS = (
    Refusal(
        "leaves the optimizer out of checkpoints",
        "leave it out: without it a run cannot go on; --save-hf writes the weights alone",
        "no_save_optim no_save_rng",
    ),
    Refusal(
        "takes only the weights of a checkpoint",
        "give its folder to --ref-load, and --load and --save folders without checkpoints",
        "no_load_optim no_load_rng finetune pretrained_checkpoint",
    ),
    Refusal(
        "names a step of the checkpoints to begin from",
        "leave it out: the newest complete one counts, which the folder's "
        "latest_checkpointed_iteration.txt names",
        "ref_ckpt_step ckpt_step",
    ),
    Refusal(
        "asks for a checkpoint by a file",
        "give --save-interval; SIGTERM saves and ends the process",
        "save_trigger_sentinel",
    ),
    Refusal(
        "loads the optimizer's state by way of the CPU's memory",
        "leave it out: it is loaded where it is used",
        "low_memory_resume",
    ),
    Refusal(
        "takes the model's sizes or the layout from a checkpoint",
        "leave it out: sizes come from the config.json of --hf-checkpoint, and any checkpoint "
        "loads in the layout of the line",
        "use_checkpoint_args use_mp_args_from_checkpoint_args",
    ),
    Refusal(
        "is how Megatron-LM reads and writes checkpoints",
        "leave it out: each rank writes its own part while the training continues "
        "(docs/resume.md); --keep-last limits their number",
        """
        save_retain_interval non_persistent_* ckpt_fully_parallel_* no_ckpt_fully_parallel_*
        ckpt_assume_* use_persistent_ckpt_* dist_ckpt_* use_dist_ckpt auto_detect_ckpt_format
        ckpt_convert_* load_main_params_from_ckpt no_strict_fsdp_dtensor_load distrib_optim_*
        exit_on_missing_checkpoint replication replication_*
        """,
    ),
)

REFUSALS = (
    *_REINFORCEMENT,
    *_EVALUATION,
    *_DATA,
    *_CODE,
    *_DIAGNOSTICS,
    *_CLUSTER,
    *_CHECKPOINTS,
    *MODEL_REFUSALS,
)
"""Flags that are refused by name. Of two that cover a name, the first counts."""
