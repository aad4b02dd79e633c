"""Counts of a model's heads, rows and parameters: arithmetic on its shape.

    queries of a token     32 heads x 128 channels = 4096 values
    keys of a token         8 heads x 128 channels = 1024 values, and as many of the values to mix
    heads of a group       32 / 8 = 4 query heads share a key/value head
    padded vocabulary      151,669 rows in multiples of 128 = 151,680

A layer's parameters by part, so that a layout can divide each as Megatron does.
"""

from __future__ import annotations

from dataclasses import dataclass

from miles.architecture.config import ModelShape


@dataclass(frozen=True)
class LayerParameters:
    """The numbers of parameters in one decoder layer, by part."""

    attention: int
    """the projections to queries, keys and values, and the one behind attention"""
    qkv_bias: int
    norms: int
    """before attention and before the MLP, and of queries and keys where the model has these"""
    mlp: int
    """gate, up and down projection of a dense layer; 0 with experts"""
    router: int
    expert: int
    """gate, up and down projection of each expert"""


def query_size(shape: ModelShape) -> int:
    """Return the values of all query heads, for one token."""
    return shape.num_attention_heads * shape.kv_channels


def key_size(shape: ModelShape) -> int:
    """Return the values of all key heads, for one token. Those of all value heads are as many."""
    return shape.num_query_groups * shape.kv_channels


def heads_per_group(shape: ModelShape) -> int:
    """Return the number of query heads that share one key/value head."""
    return shape.num_attention_heads // shape.num_query_groups


def padded_vocab_size(shape: ModelShape, divisible_by: int) -> int:
    """Return the rows of an embedding that is padded to a multiple.

    The model of a run is padded to a multiple of its tensor-parallel size, and no further.
    """
    return -(-shape.vocab_size // divisible_by) * divisible_by


def embedding_parameters(shape: ModelShape) -> int:
    """Return the parameters of the embedding. An output layer of its own has as many."""
    return shape.vocab_size * shape.hidden_size


def layer_parameters(shape: ModelShape) -> LayerParameters:
    """Return the parameters of each decoder layer, by part."""
    hidden = shape.hidden_size
    projected = query_size(shape) + 2 * key_size(shape)
    norms = 2 * hidden + (2 * shape.kv_channels if shape.qk_layernorm else 0)
    has_experts = shape.num_experts is not None

    return LayerParameters(
        attention=hidden * (projected + query_size(shape)),
        qkv_bias=projected if shape.add_qkv_bias else 0,
        norms=norms,
        mlp=0 if has_experts else 3 * hidden * shape.ffn_hidden_size,
        router=hidden * (shape.num_experts or 0),
        expert=3 * hidden * shape.moe_ffn_hidden_size if has_experts else 0,
    )


def total_parameters(shape: ModelShape) -> int:
    """Return the parameters of the whole model. A tied embedding counts once."""
    part = layer_parameters(shape)
    experts = (shape.num_experts or 0) * part.expert
    layer = part.attention + part.qkv_bias + part.norms + part.mlp + part.router + experts

    num_embeddings = 1 if shape.tied_embeddings else 2
    last_norm = shape.hidden_size
    return num_embeddings * embedding_parameters(shape) + shape.num_layers * layer + last_norm


def active_parameters(shape: ModelShape) -> int:
    """Return the parameters that one token goes through: of the experts, those it is sent to."""
    idle = (shape.num_experts or 0) - shape.moe_router_topk
    return total_parameters(shape) - shape.num_layers * idle * layer_parameters(shape).expert


def matrix_parameters(shape: ModelShape) -> int:
    """Return the parameters of the matrices that one token is multiplied with.

    Those are the active parameters without norms and biases, and with the output layer, but not the
    embedding: looking up a row is no multiplication.
    """
    part = layer_parameters(shape)
    matrices = part.attention + part.mlp + part.router + shape.moe_router_topk * part.expert
    return shape.num_layers * matrices + embedding_parameters(shape)
