"""Qwen3, dense: grouped queries, norms on queries and keys, gated MLP, tied embeddings in the small ones."""

from __future__ import annotations

from miles.architecture import ModelShape
from miles.convert.families import GATE_UP, PLAIN, Parameter, qkv_layout


def parameters(shape: ModelShape) -> tuple[Parameter, ...]:
    """The parameter map of a Qwen3 model."""
    hidden, ffn, head = shape.hidden_size, shape.ffn_hidden_size, shape.kv_channels
    queries, keys = shape.num_attention_heads * head, shape.num_query_groups * head
    attention, mlp = "model.layers.{layer}.self_attn", "model.layers.{layer}.mlp"
    layers = "decoder.layers"
    per_layer = (
        # Norms carry the names that Transformer Engine gives them, fused with the linear layer behind.
        Parameter(
            f"{layers}.self_attention.linear_qkv.layer_norm_weight",
            ("model.layers.{layer}.input_layernorm.weight",),
            ((hidden,),),
            PLAIN,
        ),
        Parameter(
            f"{layers}.self_attention.linear_qkv.weight",
            (f"{attention}.q_proj.weight", f"{attention}.k_proj.weight", f"{attention}.v_proj.weight"),
            ((queries, hidden), (keys, hidden), (keys, hidden)),
            qkv_layout(shape),
        ),
        Parameter(f"{layers}.self_attention.q_layernorm.weight", (f"{attention}.q_norm.weight",), ((head,),), PLAIN),
        Parameter(f"{layers}.self_attention.k_layernorm.weight", (f"{attention}.k_norm.weight",), ((head,),), PLAIN),
        Parameter(
            f"{layers}.self_attention.linear_proj.weight",
            (f"{attention}.o_proj.weight",),
            ((hidden, queries),),
            PLAIN,
        ),
        Parameter(
            f"{layers}.mlp.linear_fc1.layer_norm_weight",
            ("model.layers.{layer}.post_attention_layernorm.weight",),
            ((hidden,),),
            PLAIN,
        ),
        Parameter(
            f"{layers}.mlp.linear_fc1.weight",
            (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
            ((ffn, hidden), (ffn, hidden)),
            GATE_UP,
        ),
        Parameter(f"{layers}.mlp.linear_fc2.weight", (f"{mlp}.down_proj.weight",), ((hidden, ffn),), PLAIN),
    )
    embedding = ((shape.vocab_size, hidden),)
    whole = (
        Parameter(
            "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), embedding, PLAIN, per_layer=False
        ),
        Parameter("decoder.final_layernorm.weight", ("model.norm.weight",), ((hidden,),), PLAIN, per_layer=False),
    )
    head_out = Parameter("output_layer.weight", ("lm_head.weight",), embedding, PLAIN, per_layer=False)
    return (*whole, *per_layer) if shape.tied_embeddings else (*whole, *per_layer, head_out)
