"""A model's shape: read from a Hugging Face `config.json`, or from the `args` of a Megatron checkpoint.

Training and converting both build on this record, so that the two can never disagree about what a
configuration means. It holds no weights and imports neither torch nor Megatron.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from miles import storage
from miles.errors import CheckpointError

FAMILIES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",  # Qwen2.5, too
    "llama": "LlamaForCausalLM",  # Llama 3, 3.1, 3.2
}
"""Hugging Face `model_type` -> architecture that is understood."""

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Llama 3.1 and 3.2 set beside their scaling factor; megatron-core 0.16.1 knows no other values."""


@dataclass(frozen=True)
class ModelShape:
    """The numbers that fix a decoder's parameters. Field names are Megatron's where it has one."""

    model_type: str
    """Hugging Face `model_type`, one of `FAMILIES`"""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """key/value heads"""
    kv_channels: int
    """size of one head"""
    vocab_size: int
    """rows of the embedding"""
    max_position_embeddings: int
    rotary_base: float
    norm_epsilon: float
    tied_embeddings: bool
    qk_layernorm: bool
    add_qkv_bias: bool
    rope_scaling_factor: float | None = None
    """Llama 3.1's scaling of the rotary frequencies (with `LLAMA3_ROPE`); None: none"""
    num_experts: int | None = None
    """experts of each layer; None: a dense model"""
    moe_router_topk: int = 0
    """experts that a token goes through"""
    moe_ffn_hidden_size: int = 0
    """of one expert"""

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], where: str) -> ModelShape:
        """Reads the content of a `config.json`.

        Args:
            config: the parsed JSON.
            where: names the file in errors.

        Raises:
            CheckpointError: an architecture or a setting that is not understood.
        """
        model_type = config.get("model_type")
        if model_type not in FAMILIES:
            raise CheckpointError(
                f"{where}: model_type {model_type!r} is not one of {', '.join(FAMILIES)}, the families known so far"
            )
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        scaled = rope_type == "llama3"
        settings = [
            ("hidden_act", config.get("hidden_act", "silu"), "silu"),
            ("attention_bias", config.get("attention_bias", False), False),  # Qwen2's own bias is not called so
            ("mlp_bias", config.get("mlp_bias", False), False),
            ("use_sliding_window", config.get("use_sliding_window", False), False),
        ]
        if scaled:
            settings += [(f"rope {name}", float(rope.get(name, value)), value) for name, value in LLAMA3_ROPE.items()]
        else:
            settings.append(("rope type", rope_type, "default"))
        if model_type == "qwen3_moe":
            settings += [
                ("norm_topk_prob", config.get("norm_topk_prob", False), True),
                ("decoder_sparse_step", config.get("decoder_sparse_step", 1), 1),
                ("mlp_only_layers", config.get("mlp_only_layers") or [], []),
            ]
        unsupported = [
            f"{name} = {value!r}, only {wanted!r} is supported" for name, value, wanted in settings if value != wanted
        ]
        if unsupported:
            raise CheckpointError(f"{where}: " + "; ".join(unsupported))
        is_moe = model_type == "qwen3_moe"
        try:
            heads = int(config["num_attention_heads"])
            return cls(
                model_type=model_type,
                num_layers=int(config["num_hidden_layers"]),
                hidden_size=int(config["hidden_size"]),
                ffn_hidden_size=int(config["intermediate_size"]),
                num_attention_heads=heads,
                num_query_groups=int(config.get("num_key_value_heads", heads)),
                kv_channels=int(config.get("head_dim") or config["hidden_size"] // heads),
                vocab_size=int(config["vocab_size"]),
                max_position_embeddings=int(config["max_position_embeddings"]),
                rotary_base=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
                norm_epsilon=float(config["rms_norm_eps"]),
                tied_embeddings=bool(config.get("tie_word_embeddings", False)),
                qk_layernorm=model_type in ("qwen3", "qwen3_moe"),
                add_qkv_bias=model_type == "qwen2",
                rope_scaling_factor=float(rope["factor"]) if scaled else None,
                num_experts=int(config.get("num_experts") or config["num_local_experts"]) if is_moe else None,
                moe_router_topk=int(config["num_experts_per_tok"]) if is_moe else 0,
                moe_ffn_hidden_size=int(config["moe_intermediate_size"]) if is_moe else 0,
            )
        except KeyError as error:
            raise CheckpointError(f"{where}: {error.args[0]} is missing") from error

    @classmethod
    def from_hf_folder(cls, url: str) -> ModelShape:
        """Reads `config.json` of a Hugging Face checkpoint's folder (fsspec URL).

        Raises:
            CheckpointError: it is missing, is not JSON, or is of an unknown architecture.
        """
        where = storage.join(url, "config.json")
        try:
            config = json.loads(storage.read_text(where))
        except FileNotFoundError as error:
            raise CheckpointError(f"{where}: no such file; expected a Hugging Face checkpoint's folder") from error
        except ValueError as error:
            raise CheckpointError(f"{where}: not JSON ({error})") from error
        return cls.from_hf_config(config, where)

    def megatron_args(self) -> dict[str, Any]:
        """What Megatron-LM's loader reads of the model from a checkpoint's `args` (`--use-checkpoint-args`)."""
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "group_query_attention": self.num_query_groups != self.num_attention_heads,
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.kv_channels,
            "padded_vocab_size": self.vocab_size,
            "vocab_size": self.vocab_size,
            "seq_length": self.max_position_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "position_embedding_type": "rope",
            "use_rotary_position_embeddings": True,
            "rotary_base": int(self.rotary_base),
            "rotary_percent": 1.0,
            "rotary_interleaved": False,
            "norm_epsilon": self.norm_epsilon,
            "normalization": "RMSNorm",
            "qk_layernorm": self.qk_layernorm,
            "add_bias_linear": False,
            "add_qkv_bias": self.add_qkv_bias,
            "swiglu": True,
            "untie_embeddings_and_output_weights": not self.tied_embeddings,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "use_rope_scaling": self.rope_scaling_factor is not None,
            "rope_scaling_factor": self.rope_scaling_factor or 8.0,  # Megatron-LM's default, unused without scaling
            "num_experts": self.num_experts,
            **({} if self.num_experts is None else self._moe_args()),
        }

    def _moe_args(self) -> dict[str, Any]:
        return {
            "moe_router_topk": self.moe_router_topk,
            "moe_ffn_hidden_size": self.moe_ffn_hidden_size,
            "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": False,
        }

    def differences(self, args: Mapping[str, Any]) -> list[str]:
        """In which sizes a Megatron checkpoint's `args` (as a mapping) differ from this shape, one sentence each.

        A name that the checkpoint does not state does not count.
        """
        return [
            f"{name} is {args[name]} in the checkpoint, {wanted} in the configuration"
            for name, wanted in self.megatron_args().items()
            if name not in _NOT_A_SIZE and name in args and args[name] != wanted
        ]

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


_NOT_A_SIZE = ("seq_length", "max_position_embeddings", "attention_dropout", "hidden_dropout")
