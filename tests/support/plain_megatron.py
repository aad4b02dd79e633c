"""A plain `GPTModel` of megatron-core, with the local layer specification as Megatron ships it.

It is built as a user of Megatron-LM builds one: nothing of `miles.train.model` is in it.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from miles.architecture.config import ModelShape


def build(shape: ModelShape) -> Any:
    """Return a model of a shape on one rank, in float32."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import moe_utils

    # 0.16.1 uses the name without defining it where Transformer Engine is absent.
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
    experts: dict[str, Any] = {}
    if shape.num_experts is not None:
        experts = {
            "num_moe_experts": shape.num_experts,
            "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
            "moe_router_topk": shape.moe_router_topk,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
        }
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        qk_layernorm=shape.qk_layernorm,
        add_bias_linear=False,
        add_qkv_bias=shape.add_qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        **experts,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_layer_local_spec(
                num_experts=shape.num_experts,
                qk_layernorm=shape.qk_layernorm,
                normalization="RMSNorm",
            ),
            vocab_size=shape.vocab_size,
            max_sequence_length=shape.max_position_embeddings,
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=int(shape.rotary_base),
            rope_scaling=shape.rope_scaling_factor is not None,
            rope_scaling_factor=shape.rope_scaling_factor or 1.0,
        )


def build_optimizer(model: Any) -> Any:
    """Return Megatron's distributed Adam for a model, ready to be loaded.

    It has the rates of `tests.support.ranks`: megatron-core 0.19 continues with no others.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from miles.train.rank import optimizer_state
    from tests.support.ranks import SETTINGS

    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    wrapped = DistributedDataParallel(model.config, ddp_config, model)
    config = OptimizerConfig(
        optimizer="adam", lr=SETTINGS.lr, min_lr=SETTINGS.min_lr, use_distributed_optimizer=True
    )
    optimizer = get_megatron_optimizer(config, [wrapped])
    # 0.16.1 needs these where neither Apex nor Transformer Engine is installed.
    optimizer_state.prepare(optimizer)
    optimizer_state.keep_step_counts(optimizer)
    return optimizer


def moments(optimizer: Any) -> np.ndarray:
    """Return the first moments of all parameters, float32, end to end in the optimizer's order."""
    found = []
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            found += [part.optimizer.state[master]["exp_avg"] for master in group["params"]]
    return np.concatenate([moment.detach().numpy().reshape(-1) for moment in found])


def load_with_optimizer(state: dict[str, Any], optimizer: Any, folder: Path) -> None:
    """Load a checkpoint into an optimizer, as Megatron-LM's loader does with its default flags.

    Args:
        state: the model's sharded state, whose keys the optimizer's follow.
    """
    from megatron.core import dist_checkpointing, parallel_state

    metadata = dist_checkpointing.load_content_metadata(str(folder))
    assert metadata is not None, "Megatron-LM would take the state for one of an older format"
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    wanted = optimizer.sharded_state_dict(state, is_loading=True, metadata=metadata)
    loaded = dist_checkpointing.load({"model": state, "optimizer": wanted}, str(folder))
    optimizer.load_state_dict(loaded["optimizer"])


def logits(model: Any, text: Sequence[int]) -> np.ndarray:
    """Return the logits of each position of a text, float32 [tokens, vocabulary]."""
    import torch

    tokens = torch.tensor([list(text)])
    with torch.no_grad():
        found = model(tokens, torch.arange(len(text))[None], None)
    array: np.ndarray = found[0].float().numpy()
    return array


def save(state: dict[str, Any], shape: ModelShape, root: Path, iteration: int) -> None:
    """Save a model's state as Megatron-LM does: `iter_0000005`, its `args`, and the tracker."""
    from megatron.core import dist_checkpointing

    folder = root / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    args = argparse.Namespace(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        padded_vocab_size=shape.vocab_size,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        consumed_train_samples=640,
        ckpt_format="torch_dist",
    )
    content = {"model": state, "args": args, "checkpoint_version": 3.0, "iteration": iteration}
    dist_checkpointing.save(content, str(folder))
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
