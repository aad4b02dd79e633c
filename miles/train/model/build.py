"""Build a rank's part of a Megatron `GPTModel`, with attention over packed sequences.

ModelShape, Layout -> TransformerConfig -> layer spec (our norm, our attention) -> GPTModel
"""

from __future__ import annotations

import warnings
from typing import Any

from miles.architecture.config import ModelShape
from miles.architecture.sizes import padded_vocab_size
from miles.train.compute_config import AS_USUAL, ComputeConfig
from miles.train.model import device, weight_gradients
from miles.train.model.adapters import add_adapters
from miles.train.model.experts import CANNOT_GROUP, can_group, group_experts
from miles.train.model.layer_spec import block_spec
from miles.train.model.padding_rows import mask_padding_rows
from miles.train.model.rotary import RotaryFrequencies
from miles.train.model.transformer_config import transformer_config
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.recompute_config import RecomputeConfig
from miles.train.types import AdapterSettings


def build_model(
    shape: ModelShape,
    layout: Layout,
    *,
    precision: Precision,
    recompute: RecomputeConfig,
    compute: ComputeConfig = AS_USUAL,
    lora: AdapterSettings | None = None,
) -> Any:
    """Return this rank's part of a `GPTModel`, on the GPU where there is one.

    The process groups must have been joined (`process_groups.initialize`). The weights are
    Megatron's random ones.

    Args:
        lora: adapters that are trained beside the frozen weights; None: the weights are trained.

    Raises:
        ConfigError: the model cannot be divided among the ranks of the layout.
    """
    from megatron.core import parallel_state

    from miles.train.model.gpt import PackedGPTModel

    layout.require_fits(shape)
    is_grouping_asked_for = bool(compute.grouped_experts)
    compute = compute.resolved(has_gpus=device.has_gpu(), data_parallel=layout.data)
    if shape.num_experts is not None:
        _define_te_general_gemm()
    weight_gradients.install()
    config = transformer_config(
        shape, layout, precision=precision, recompute=recompute, compute=compute
    )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PackedGPTModel(
            config=config,
            transformer_layer_spec=block_spec(shape, config, compute),
            vocab_size=padded_vocab_size(shape, layout.tensor),
            max_sequence_length=shape.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=shape.tied_embeddings,
            # Megatron's own, segment by segment, or none: `PackedAttention` rotates.
            position_embedding_type="none" if compute.packed_rope else "rope",
            rotary_base=int(shape.rotary_base),
            rope_scaling=shape.rope_scaling_factor is not None,
            rope_scaling_factor=shape.rope_scaling_factor or 1.0,
            parallel_output=True,
        )
    model.model_type = "encoder_or_decoder"  # read by the pipeline schedules
    model.loss_chunk_size = compute.loss_chunk_size
    model.is_loss_fused = compute.loss_fusion
    model.packed_rotary = RotaryFrequencies.of(shape) if compute.packed_rope else None
    mask_padding_rows(model, shape)
    if lora is not None:
        add_adapters(model, shape, lora)
    if compute.grouped_experts and shape.num_experts is not None:
        if can_group(precision):
            group_experts(model)
        elif is_grouping_asked_for:
            warnings.warn(CANNOT_GROUP, stacklevel=2)
    return model.cuda() if device.has_gpu() else model


def _define_te_general_gemm() -> None:
    """Give megatron-core 0.16.1's router a name that it uses without defining it.

    Without Transformer Engine, `moe_utils.te_general_gemm` is missing (NameError in the router).
    """
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
