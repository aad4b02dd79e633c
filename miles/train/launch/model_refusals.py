"""Flags that are refused because they ask for another model, or for another way to compute it.

--kv-lora-rank 16  ->  --kv-lora-rank belongs to architectures that are not supported; …
"""

from __future__ import annotations

from miles.train.launch.refusal import Refusal

_MODEL = (
    Refusal(
        "is about LoRA during reinforcement learning, about several adapters at once, or about "
        "experts",
        "leave it out; --lora-rank, --lora-alpha, --lora-dropout, --target-modules, "
        "--exclude-modules and --lora-adapter-path are what LoRA has here",
        """
        lora_base_* lora_sync_* lora_train_only lora_type experts_shared_outer_loras check_lora_*
        multi_lora_*
        """,
    ),
    Refusal(
        "belongs to DoRA, which scales each row of a weight beside its adapter, and is not supported",
        "leave it out; --use-rslora changes the scale of an adapter",
        "use_dora lora_use_dora dora_*",
    ),
    Refusal(
        "belongs to architectures that are not supported",
        "leave it out if the model has no such part; docs/convert.md names the families, and "
        "docs/adding-a-model.md says how one is added",
        """
        multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
        rotary_scaling_factor mscale mscale_all_dim original_max_position_embeddings beta_fast
        beta_slow moe_shared_expert_* moe_router_enable_expert_bias moe_latent_size
        use_gated_attention attention_output_gate apply_layernorm_1p layernorm_zero_centered_gamma
        post_self_attn_layernorm post_mlp_layernorm linear_attention_* experimental_attention_*
        dsa_* dsv4_* miles_dsa_* freeze_indexer activation_func_clamp_value
        no_activation_func_clamp_* softmax_type window_size window_attn_* squared_relu
        quick_geglu openai_gelu is_hybrid_model hybrid_* mamba_* enable_experimental
        enable_mtp_training mtp_* rotary_seq_len_interpolation_factor no_rope_freq mrope_section
        relative_attention_* glu_linear_offset qk_l2_norm qk_clip* heterogeneous_*
        encoder_num_layers decoder_num_layers cache_mla_latents use_legacy_models
        fp32_residual_connection
        apply_residual_connection_* apply_query_key_layer_scaling no_query_key_layer_scaling
        moe_apply_probs_on_input
        """,
    ),
    Refusal(
        "changes the experts that a token goes to",
        "leave it out: the router is the model's own, and no token is dropped",
        """
        moe_router_force_* moe_input_jitter_eps moe_expert_capacity_factor
        moe_pad_expert_input_to_capacity moe_token_dropping moe_router_topk_limited_devices
        """,
    ),
)

_NOT_YET = (
    Refusal(
        "makes a model with experts of a dense one",
        "leave it out: the model is that of config.json",
        "moe_use_upcycling moe_upcycling_*",
    ),
    Refusal(
        "is how new weights are drawn",
        "leave it out: the weights come from a checkpoint",
        "init_method_* embedding_init_method_* data_parallel_random_init init_model_with_*",
    ),
    Refusal(
        "is the type of the numbers by another name",
        "leave it out for bfloat16, or give --fp16 or --no-bf16",
        "params_dtype",
    ),
    Refusal(
        "is another name for computing activations twice",
        "give --recompute-granularity selective (the inner part of attention) or full (whole "
        "layers)",
        "recompute_activations checkpoint_activations gradient_checkpointing",
    ),
    Refusal(
        "is an old name in Megatron-LM",
        "give --tensor-model-parallel-size, and for experts --expert-tensor-parallel-size",
        "model_parallel_size moe_extended_tp",
    ),
    Refusal(
        "divides the layers over pipeline stages unevenly or in turns, which is not supported yet",
        "leave it out: give a --pipeline-model-parallel-size that divides the number of layers",
        """
        virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage
        num_virtual_stages_* decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
        pipeline_model_parallel_layout account_for_* microbatch_group_size_*
        """,
    ),
    Refusal(
        "belongs to context parallelism, which is not supported yet",
        "leave it out; room for long samples comes from --tensor-model-parallel-size with "
        "--sequence-parallel, and from --recompute-granularity",
        "cp_comm_type allgather_cp hierarchical_context_parallel_sizes",
    ),
    Refusal(
        "sets the loss scale of float16, which follows the gradient by itself",
        "leave it out",
        "loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis",
    ),
    Refusal(
        "chooses a part of --optimizer-cpu-offload, which always has torch's Adam and pinned "
        "memory",
        "leave it out",
        "use_torch_optimizer_for_cpu_offload no_pin_cpu_grads no_pin_cpu_params",
    ),
    Refusal(
        "keeps the optimizer's state on disk, which is not supported",
        "leave it out; --optimizer-cpu-offload keeps it in the machine's memory, and more "
        "data-parallel ranks leave less of it to each",
        "stream_optimizer_state_*",
    ),
    Refusal(
        "computes the loss again in the backward pass, which is not supported yet",
        "leave it out; a lower --max-tokens-per-gpu or a higher --tensor-model-parallel-size "
        "shrinks the logits",
        "recompute_loss_function",
    ),
    Refusal(
        "chooses a way to compute the same that is not supported yet",
        "leave it out",
        """
        overlap_p2p_* tp_comm_* use_torch_fsdp2
        use_megatron_fsdp fsdp_* moe_enable_deepep moe_deepep_* moe_hybridep_* moe_flex_*
        moe_shared_expert_overlap cross_entropy_fusion_impl recompute_modules moe_layer_recompute
        cpu_offloading* fine_grained_* offload_modules ddp_num_* ddp_pad_* ddp_average_*
        ddp_reduce_* use_nccl_ub
        use_sharp nccl_communicator_* high_priority_stream_groups defer_embedding_*
        enable_cuda_graph external_cuda_graph cuda_graph_* disable_bf16_reduced_*
        distribute_saved_activations overlap_moe_* delay_wgrad_* wgrad_deferral_limit
        disable_tp_comm_* no_overlap_p2p_* no_align_* no_scatter_gather_tensors_in_pipeline
        no_gradient_reduce_div_fusion no_persist_layer_norm no_clone_scatter_output_in_embedding
        no_async_tensor_model_parallel_allreduce no_delay_grad_reduce no_contiguous_buffers_*
        disable_gloo_process_groups data_parallel_sharding_strategy te_rng_tracker
        num_distributed_optimizer_instances use_tp_pp_dp_mapping use_ring_exchange_p2p
        sharp_enabled_group empty_unused_memory_level use_te_activation_func
        use_fused_weighted_squared_relu
        """,
    ),
    Refusal(
        "is not supported yet",
        "leave it out",
        """
        fp8* fp4* no_fp8_* moe_router_padding_* first_last_layers_bf16 num_layers_at_*
        grad_reduce_in_bf16 clip_grad_by_value weight_decay_incr_style
        start_weight_decay end_weight_decay lr_warmup_init lr_wsd_* decoupled_*
        use_checkpoint_opt_param_scheduler override_opt_param_scheduler sgd_momentum muon_*
        no_weight_decay_* apply_wd_* iterations_to_skip
        """,
    ),
)

MODEL_REFUSALS = (*_MODEL, *_NOT_YET)
"""The first of two that cover a name counts."""
