"""What the families have in common: the shape of a decoder, and its parameters part by part."""

from __future__ import annotations

from miles.architecture.config import HfConfig, ModelShape
from miles.architecture.families import EXPERT, LAYER, Parameter, gate_up, plain, qkv

_LAYERS = "decoder.layers"
_ATTENTION = "model.layers.{layer}.self_attn"
_MLP = "model.layers.{layer}.mlp"


def shape(
    config: HfConfig,
    *,
    qk_layernorm: bool = False,
    add_qkv_bias: bool = False,
    rope_scaling_factor: float | None = None,
) -> ModelShape:
    """The shape of a dense decoder: RMS norms, rotary positions, SiLU gates, no bias but perhaps on q, k and v.

    Args:
        rope_scaling_factor: that of a family which scales its rotary frequencies; None: one that does not may not ask
            for it.

    Raises:
        CheckpointError: what this decoder does not have.
    """
    config.require(
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        (
            "attention_bias",
            config.get("attention_bias", False),
            False,
        ),  # Qwen2's own bias is not called so
        ("mlp_bias", config.get("mlp_bias", False), False),
        ("use_sliding_window", config.get("use_sliding_window", False), False),
        *(() if rope_scaling_factor else (("rope type", config.rope_type, "default"),)),
    )
    heads = int(config["num_attention_heads"])
    return ModelShape(
        model_type=config["model_type"],
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=int(config["hidden_size"]),
        ffn_hidden_size=int(config["intermediate_size"]),
        num_attention_heads=heads,
        num_query_groups=int(config.get("num_key_value_heads", heads)),
        kv_channels=int(config.get("head_dim") or config["hidden_size"] // heads),
        vocab_size=int(config["vocab_size"]),
        max_position_embeddings=int(config["max_position_embeddings"]),
        rotary_base=float(config.rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
        norm_epsilon=float(config["rms_norm_eps"]),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_layernorm=qk_layernorm,
        add_qkv_bias=add_qkv_bias,
        rope_scaling_factor=rope_scaling_factor,
    )


def ends(shape: ModelShape) -> tuple[Parameter, ...]:
    """Embedding, last norm, and the output layer where it is not the embedding."""
    embedding = ((shape.vocab_size, shape.hidden_size),)
    both = (
        Parameter(
            "embedding.word_embeddings.weight",
            ("model.embed_tokens.weight",),
            embedding,
            plain,
            is_vocabulary=True,
        ),
        Parameter(
            "decoder.final_layernorm.weight", ("model.norm.weight",), ((shape.hidden_size,),), plain
        ),
    )
    if shape.tied_embeddings:
        return both
    return (
        *both,
        Parameter("output_layer.weight", ("lm_head.weight",), embedding, plain, is_vocabulary=True),
    )


def attention(shape: ModelShape) -> tuple[Parameter, ...]:
    """Of each layer: norm, queries, keys and values (with a bias in some families), norms of these, projection."""
    hidden, head = shape.hidden_size, shape.kv_channels
    queries, keys = shape.num_attention_heads * head, shape.num_query_groups * head
    parts = tuple(f"{_ATTENTION}.{name}_proj" for name in "qkv")
    parameters = [
        # Norms carry the names that Transformer Engine gives them, fused with the linear layer behind.
        Parameter(
            f"{_LAYERS}.self_attention.linear_qkv.layer_norm_weight",
            ("model.layers.{layer}.input_layernorm.weight",),
            ((hidden,),),
            plain,
            LAYER,
        ),
        Parameter(
            f"{_LAYERS}.self_attention.linear_qkv.weight",
            tuple(f"{part}.weight" for part in parts),
            ((queries, hidden), (keys, hidden), (keys, hidden)),
            qkv(shape),
            LAYER,
        ),
        Parameter(
            f"{_LAYERS}.self_attention.linear_proj.weight",
            (f"{_ATTENTION}.o_proj.weight",),
            ((hidden, queries),),
            plain,
            LAYER,
        ),
    ]
    if shape.add_qkv_bias:
        parameters.append(
            Parameter(
                f"{_LAYERS}.self_attention.linear_qkv.bias",
                tuple(f"{part}.bias" for part in parts),
                ((queries,), (keys,), (keys,)),
                qkv(shape),
                LAYER,
            )
        )
    if shape.qk_layernorm:
        parameters += [
            Parameter(
                f"{_LAYERS}.self_attention.{name}_layernorm.weight",
                (f"{_ATTENTION}.{name}_norm.weight",),
                ((head,),),
                plain,
                LAYER,
            )
            for name in "qk"
        ]
    return tuple(parameters)


def mlp_norm(shape: ModelShape) -> Parameter:
    """The norm before a layer's MLP or experts."""
    return Parameter(
        f"{_LAYERS}.mlp.linear_fc1.layer_norm_weight",
        ("model.layers.{layer}.post_attention_layernorm.weight",),
        ((shape.hidden_size,),),
        plain,
        LAYER,
    )


def mlp(shape: ModelShape) -> tuple[Parameter, ...]:
    """Of each layer: norm, gate and up projection, down projection."""
    return (
        mlp_norm(shape),
        *_gated(f"{_LAYERS}.mlp", _MLP, shape.hidden_size, shape.ffn_hidden_size, LAYER),
    )


def experts(shape: ModelShape) -> tuple[Parameter, ...]:
    """Of each layer: norm, router, and of each expert gate and up projection, down projection."""
    assert shape.num_experts is not None
    router = Parameter(
        f"{_LAYERS}.mlp.router.weight",
        (f"{_MLP}.gate.weight",),
        ((shape.num_experts, shape.hidden_size),),
        plain,
        LAYER,
    )
    expert = f"{_MLP}.experts.{{expert}}"
    of_experts = _gated(
        f"{_LAYERS}.mlp.experts.experts",
        expert,
        shape.hidden_size,
        shape.moe_ffn_hidden_size,
        EXPERT,
    )
    return (mlp_norm(shape), router, *of_experts)


def _gated(
    megatron: str, hf: str, hidden: int, ffn: int, stacked_by: tuple[str, ...]
) -> tuple[Parameter, Parameter]:
    return (
        Parameter(
            f"{megatron}.linear_fc1.weight",
            (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"),
            ((ffn, hidden), (ffn, hidden)),
            gate_up,
            stacked_by,
        ),
        Parameter(
            f"{megatron}.linear_fc2.weight",
            (f"{hf}.down_proj.weight",),
            ((hidden, ffn),),
            plain,
            stacked_by,
        ),
    )
