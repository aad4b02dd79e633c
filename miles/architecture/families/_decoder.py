"""The common part of the families: the shape of a decoder, and its parameter map part by part."""

from __future__ import annotations

from miles.architecture.config import HfConfig, ModelShape
from miles.architecture.parameters import (
    EMBEDDING,
    EXPERT,
    EXPERTS_NORM,
    FUSED_NORM,
    LAYER,
    OUTPUT_LAYER,
    ExtraState,
    Parameter,
    gate_up,
    plain,
    qkv,
)
from miles.architecture.sizes import key_size, query_size

_LAYERS = "decoder.layers"
_ATTENTION = "model.layers.{layer}.self_attn"
_MLP = "model.layers.{layer}.mlp"


def shape(
    config: HfConfig,
    *,
    head_dim: int | None = None,
    qk_layernorm: bool = False,
    add_qkv_bias: bool = False,
    rope_scaling_factor: float | None = None,
) -> ModelShape:
    """Return the shape of a dense decoder.

    It has RMS norms, rotary positions, SiLU gates, and no biases but those of `add_qkv_bias`.

    Args:
        head_dim: the size of a head where the configuration names none, as transformers has it for
            the family; None: the heads share the hidden size.
        rope_scaling_factor: of a family that scales its rotary frequencies; None: the configuration
            may not ask for scaling.

    Raises:
        CheckpointError: a setting that this decoder does not have.
    """
    settings = [
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        # Qwen2's own bias has another name.
        ("attention_bias", config.get("attention_bias", False), False),
        ("mlp_bias", config.get("mlp_bias", False), False),
        ("use_sliding_window", config.get("use_sliding_window", False), False),
    ]
    if not rope_scaling_factor:
        settings.append(("rope type", config.rope_type, "default"))
    config.require(*settings)

    hidden_size = config.whole("hidden_size")
    heads = config.whole("num_attention_heads")
    head_dim = config.whole("head_dim", head_dim or 0) or head_dim
    return ModelShape(
        model_type=config["model_type"],
        num_layers=config.whole("num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=config.whole("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=config.whole("num_key_value_heads", heads),
        kv_channels=head_dim or hidden_size // max(heads, 1),
        vocab_size=config.whole("vocab_size"),
        max_position_embeddings=config.whole("max_position_embeddings"),
        rotary_base=_rotary_base(config),
        norm_epsilon=config.positive("rms_norm_eps"),
        tied_embeddings=config.flag("tie_word_embeddings", False),
        qk_layernorm=qk_layernorm,
        add_qkv_bias=add_qkv_bias,
        rope_scaling_factor=rope_scaling_factor,
    )


def _rotary_base(config: HfConfig) -> float:
    """Return the base of the rotary embedding, which older files have beside its settings."""
    rope = config.rope
    if rope.get("rope_theta") is not None:
        return rope.positive("rope_theta")
    return config.positive("rope_theta", 10_000.0)


def ends(shape: ModelShape) -> tuple[Parameter, ...]:
    """Return the embedding, the last norm, and the output layer where it is not the embedding."""
    hf_shape = ((shape.vocab_size, shape.hidden_size),)
    embedding = Parameter(
        EMBEDDING,
        ("model.embed_tokens.weight",),
        hf_shape,
        plain,
        is_vocabulary=True,
    )
    norm = Parameter(
        "decoder.final_layernorm.weight", ("model.norm.weight",), ((shape.hidden_size,),), plain
    )
    if shape.tied_embeddings:
        return (embedding, norm)

    output = Parameter(OUTPUT_LAYER, ("lm_head.weight",), hf_shape, plain, is_vocabulary=True)
    return (embedding, norm, output)


def attention(shape: ModelShape) -> tuple[Parameter, ...]:
    """Return the attention of each layer.

    It is a norm, the projections to queries, keys and values (with a bias in some families), norms
    of queries and keys in others, and the projection behind.
    """
    hidden = shape.hidden_size
    queries = query_size(shape)
    keys = key_size(shape)
    projections = [f"{_ATTENTION}.{name}_proj" for name in "qkv"]

    parameters = [
        # Transformer Engine fuses a norm with the linear layer behind it: hence its name.
        Parameter(
            f"{_LAYERS}.self_attention.linear_qkv.layer_norm_weight",
            ("model.layers.{layer}.input_layernorm.weight",),
            ((hidden,),),
            plain,
            LAYER,
        ),
        Parameter(
            f"{_LAYERS}.self_attention.linear_qkv.weight",
            tuple(f"{projection}.weight" for projection in projections),
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
                tuple(f"{projection}.bias" for projection in projections),
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
                ((shape.kv_channels,),),
                plain,
                LAYER,
            )
            for name in "qk"
        ]
    return tuple(parameters)


def mlp_norm(shape: ModelShape) -> Parameter:
    """Return the norm before each layer's MLP or experts."""
    return Parameter(
        FUSED_NORM,
        ("model.layers.{layer}.post_attention_layernorm.weight",),
        ((shape.hidden_size,),),
        plain,
        LAYER,
        second_key=EXPERTS_NORM if shape.num_experts is not None else None,
    )


def mlp(shape: ModelShape) -> tuple[Parameter, ...]:
    """Return the MLP of each layer: a norm, the gate and up projections, the down projection."""
    matrices = _gated(f"{_LAYERS}.mlp", _MLP, shape.hidden_size, shape.ffn_hidden_size, LAYER)
    return (mlp_norm(shape), *matrices)


def experts(shape: ModelShape) -> tuple[Parameter, ...]:
    """Return the experts of each layer: a norm, a router, three projections of each expert."""
    assert shape.num_experts is not None
    router = Parameter(
        f"{_LAYERS}.mlp.router.weight",
        (f"{_MLP}.gate.weight",),
        ((shape.num_experts, shape.hidden_size),),
        plain,
        LAYER,
    )

    matrices = _gated(
        f"{_LAYERS}.mlp.experts.experts",
        f"{_MLP}.experts.{{expert}}",
        shape.hidden_size,
        shape.moe_ffn_hidden_size,
        EXPERT,
    )
    return (mlp_norm(shape), router, *matrices)


def _gated(
    megatron: str, hf: str, hidden: int, ffn: int, stacked_by: tuple[str, ...]
) -> tuple[Parameter, Parameter]:
    """Return the gate and up projections, one tensor in Megatron, and the down projection."""
    gate_and_up = Parameter(
        f"{megatron}.linear_fc1.weight",
        (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"),
        ((ffn, hidden), (ffn, hidden)),
        gate_up,
        stacked_by,
    )

    down = Parameter(
        f"{megatron}.linear_fc2.weight",
        (f"{hf}.down_proj.weight",),
        ((hidden, ffn),),
        plain,
        stacked_by,
    )
    return (gate_and_up, down)


def extra_states(shape: ModelShape) -> tuple[ExtraState, ...]:
    """Return the extra states that a model's layers have, in either of Megatron's specifications.

    Both have those of the linear layers. Only Transformer Engine's has those of norms and of
    attention.
    """
    modules = ["linear_qkv", "linear_proj", "core_attention"]
    if shape.qk_layernorm:
        modules += ["q_layernorm", "k_layernorm"]
    states = [ExtraState(f"{_LAYERS}.self_attention.{module}", LAYER) for module in modules]

    projections = ("linear_fc1", "linear_fc2")
    if shape.num_experts is None:
        states += [ExtraState(f"{_LAYERS}.mlp.{module}", LAYER) for module in projections]
    else:
        # Grouped and sequential experts have the same keys.
        experts = f"{_LAYERS}.mlp.experts.experts"
        states.append(ExtraState(f"{_LAYERS}.pre_mlp_layernorm", LAYER))
        states += [ExtraState(f"{experts}.{module}", EXPERT) for module in projections]

    return (*states, ExtraState("decoder.final_layernorm"))
